"""The protocol: every person x prompt x seed, with and without identity, scored picture by picture."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from tqdm import tqdm

from pidiff.runtime.errors import FaceError

from ..data.factors import COLOURS, Factors, caption
from . import metrics
from .edits import DirectionReader, follow
from .generators import LEVELS
from .readers import FactorReader, FaceTools
from .subjects import Subject

LEVEL_PEOPLE = 20                # people on whom single level groups are switched: four pictures each
ID_SCALES = 0.0, 0.25, 0.5, 0.75, 1.0, 1.25
PATTERNS = (                                    # {} takes a colour
    Factors("photo", "{}"), Factors("photo", "{}", "smiling"), Factors("black and white photo"), Factors("watercolour painting", "{}"),
    Factors("photo", "{}", "serious"), Factors("sepia photo"), Factors("photo", "beach", None, "straight ahead"),
    Factors("pencil sketch"), Factors("photo", "{}", None, "left"), Factors("photo", "{}", "smiling", "right"),
    Factors("photo", "night sky"), Factors("watercolour painting", "sunset"),
)


def prompt_factors(prompt: int, person: int) -> Factors:
    """Factors of the `prompt`-th prompt for the `person`-th person: colours rotate, so that all are asked for."""
    pattern = PATTERNS[prompt % len(PATTERNS)]
    colour = list(COLOURS)[(person + 3 * prompt) % len(COLOURS)]
    background = pattern.background and pattern.background.format(colour)
    return Factors(pattern.style, background, pattern.expression, pattern.pose)


@dataclass
class Records:
    """What a run leaves: one row per picture, extra measurements, and pictures to look at."""

    rows: list[dict] = field(default_factory=list)
    switched: list[tuple[str, float]] = field(default_factory=list)         # person, change of background
    levels: dict[str, list[tuple[str, float]]] = field(default_factory=lambda: {level: [] for level in LEVELS})
    leakage: list[tuple[str, float]] = field(default_factory=list)          # person, change where nothing was changed
    edits: dict[str, list[tuple[str, float, float]]] = field(default_factory=dict)   # direction -> person, Spearman, similarity
    curves: list[dict] = field(default_factory=list)
    pictures: dict[str, list[np.ndarray]] = field(default_factory=dict)     # person -> reference, then one per prompt
    skipped: dict[str, str] = field(default_factory=dict)                   # person -> why


class Evaluation:
    """Runs one generator over subjects; `gallery` [N, D] holds the embeddings of all references."""

    def __init__(self, generator, subjects: list[Subject], tools: FaceTools, factors: FactorReader):
        self.generator, self.subjects, self.tools, self.factors = generator, subjects, tools, factors
        self.records, self._base = Records(), {}
        self.people, vectors = [], []
        for subject in tqdm(subjects, desc="enroll", disable=None):
            try:
                person = generator.enroll(subject.reference)
            except FaceError as error:
                self.records.skipped[subject.name] = str(error)
                continue
            reference, other = tools.embed(subject.reference), tools.embed(subject.other)
            if reference is None or other is None:
                self.records.skipped[subject.name] = "the embedder's detector found no face in one of the photos"
                continue
            self.people.append((subject, person, reference, other))
            vectors.append(reference)
        if len(vectors) < 2:
            raise ValueError(f"data must hold at least two people whose face is found, got {len(vectors)}")
        self.gallery = np.stack(vectors)
        self.others = np.stack([other for *_, other in self.people])

    @property
    def impostor(self) -> np.ndarray:
        """Similarities of every person's other photo to everybody else's reference [N (N - 1)]."""
        return (self.others @ self.gallery.T)[~np.eye(len(self.others), dtype=bool)]

    def run(self, prompts: int, seeds: int, curve_people: int = 0, pairs: int = 0, edits: int = 0, reader: DirectionReader | None = None,
            curve_starts: Sequence[float] = (0.0,)) -> Records:
        for i in tqdm(range(len(self.people)), desc="people", disable=None):
            self.records.pictures[self.people[i][0].name] = [self.people[i][0].reference]
            for prompt in range(prompts):
                self._prompt(i, prompt, seeds)
            self._switch_and_levels(i)
        for i in tqdm(range(min(pairs, len(self.people))), desc="pairs", disable=None):
            self._pair(i)
        for i in tqdm(range(min(edits, len(self.people)) if reader else 0), desc="edits", disable=None):
            subject, person, reference, _ = self.people[i]
            for name, scores in follow(self.generator, person, reference, caption(prompt_factors(0, i)), reader).items():
                self.records.edits.setdefault(name, []).append((subject.name, *scores))
        for i in tqdm(range(min(curve_people, len(self.people))), desc="curves", disable=None):
            self._curve(i, curve_starts)
        return self.records

    def base(self, text: str, seed: int) -> np.ndarray:
        """The picture without identity, kept: people share it."""
        if (text, seed) not in self._base:
            self._base[text, seed] = self.generator.generate(None, text, seed, id_scale=0.0)[0]
        return self._base[text, seed]

    def background(self, *pictures: np.ndarray) -> np.ndarray:
        """Boolean mask [H, W] of what is background in all of the pictures, with a margin."""
        return cv2.dilate(np.max([self.tools.mask(p) for p in pictures], 0), np.ones((9, 9))) < 0.1

    def _prompt(self, i: int, prompt: int, seeds: int) -> None:
        subject, person, reference, other = self.people[i]
        wanted, pictures = prompt_factors(prompt, i), []
        text = caption(wanted)
        for seed in range(100 * prompt, 100 * prompt + seeds):
            started = time.perf_counter()
            image, identity_map = self.generator.generate(person, text, seed)
            seconds = time.perf_counter() - started
            base, vector, mask = self.base(text, seed), self.tools.embed(image), self.tools.mask(image)
            inside = float("nan") if identity_map is None else metrics.share_inside(
                cv2.resize(identity_map.astype(np.float32), image.shape[1::-1], interpolation=cv2.INTER_NEAREST), mask)
            self.records.rows.append({
                "person": subject.name, "prompt": text, "seed": seed, "face_found": float(vector is not None),
                "rank1": metrics.rank1(vector, self.gallery, i),
                "similarity_reference": metrics.similarity(vector, reference),
                "similarity_other": metrics.similarity(vector, other),
                "similarity_base": metrics.similarity(self.tools.embed(base), reference),
                "copy_paste": metrics.copy_paste(vector, reference, other),
                "disruption": metrics.change_outside(image, base, self.background(image, base)),
                "identity_map_inside": inside,
                **{f"{k}_accuracy": v for k, v in self.factors.correct(image, mask, wanted).items()}, "seconds": seconds})
            pictures.append(image)
        self.records.rows[-1]["diversity"] = metrics.diversity(pictures)
        self.records.pictures[subject.name].append(pictures[0])

    def _switch_and_levels(self, i: int) -> None:
        """The same prompt and seed with the next person, whole and one level group at a time."""
        subject, person, *_ = self.people[i]
        next_person = self.people[(i + 1) % len(self.people)][1]
        text = caption(prompt_factors(0, i))
        image = self.records.pictures[subject.name][1]
        switched = self.generator.generate(next_person, text, 0)[0]
        self.records.switched.append((subject.name, metrics.change_outside(image, switched, self.background(image, switched))))
        mask = self.tools.mask(image)
        for level in self.generator.levels if i < LEVEL_PEOPLE else ():
            edited = self.generator.generate(self.generator.mix(person, next_person, level), text, 0)[0]
            change = np.abs(image.astype(np.float32) - edited).mean(-1)
            self.records.levels[level].append((subject.name, metrics.share_inside(change, mask)))

    def _pair(self, i: int) -> None:
        """Two people, one per half: how much the left half changes when the right person is another, relative to the right."""
        text = caption(prompt_factors(0, i))
        left, right, third = (self.people[(i + k) % len(self.people)][1] for k in range(3))
        a, b = (self.generator.generate_two(left, who, text, 0) for who in (right, third))
        change = np.abs(a.astype(np.float32) - b).mean(-1)
        half = change.shape[1] // 2
        self.records.leakage.append((self.people[i][0].name, float(change[:, :half].mean() / max(change[:, half:].mean(), 1e-6))))

    def _curve(self, i: int, starts: Sequence[float]) -> None:
        subject, person, reference, _ = self.people[i]
        wanted = prompt_factors(0, i)
        text, base = caption(wanted), self.base(caption(wanted), 0)
        for id_start in starts:
            for id_scale in ID_SCALES:
                image = base if id_scale == 0 else self.generator.generate(person, text, 0, id_scale, id_start)[0]
                self.records.curves.append({
                    "person": subject.name, "id_scale": id_scale, "id_start": id_start,
                    "similarity": metrics.similarity(self.tools.embed(image), reference),
                    "background_accuracy": self.factors.correct(image, self.tools.mask(image), wanted)["background"],
                    "disruption": metrics.change_outside(image, base, self.background(image, base))})
