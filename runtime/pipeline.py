"""The pipeline: a photo and a prompt in, pictures out, from one bundle and one engine."""

import contextlib
import hashlib
import threading
import time
import warnings
from functools import cached_property, partial

import numpy as np

from .bundle import Bundle
from .compiled import CompiledEngines, find_compiled
from .control_group import granted_threads
from .cuda import find_gpu
from .denoise import Conditions, Plan
from .device_budget import DeviceBudget
from .device_loop import make_denoiser
from .diagnosis import located
from .engine_specs import BACKENDS
from .engines import AUTO, ENGINES, PRECISIONS, bind_new, call, choose_engine, fall_back, load_engine
from .errors import EngineError, NotFinite, PidiffError, require
from .faces import FaceReader, to_image, to_planes
from .identity import Identity
from .memory import STAGE_OF, STAGES, Budget, check_limit, fits, give_back
from .options import MAX_PEOPLE, Options, check_levels, resolve_mask, resolve_people, resolve_seeds, warn_foreign
from .presets import resolve_preset
from .progress import Progress
from .recent import Recent
from .result import Result
from .schedule import make_schedule
from .sizes import decode_in_tiles, is_free, latent_shape
from .text import TextTokenizer
from .turns import draws, in_turn

LEVELS = ("coarse", "middle", "fine", "finest")
# The graphs that take the time, on few shapes. All others run once per person, prompt or plan: nothing would be gained
# by rounding them, and an enrolled person is the same on every engine.
DRAWING = ("denoise", "decode")
HOT_GRAPHS = tuple(graph for stage in DRAWING for graph in STAGES[stage])
ALL, PICTURE = tuple(STAGES), tuple(stage for stage in STAGES if stage != "enroll")


class Pipeline:
    """Make one with `Pipeline.from_bundle`. Graphs load when they are first used; threads that share it take turns.

    Attributes: bundle, engine (the name of the one that is used), device, precision, seconds (stage -> wall time since
    the last `generate` began).
    """

    def __init__(self, bundle, engine=AUTO, device="cpu", threads=None, precision="auto", keep=None, max_memory=None, warm=None):
        require(precision in PRECISIONS, "precision", f"be one of {', '.join(PRECISIONS)}", repr(precision))
        require(threads is None or (type(threads) is int and 1 <= threads <= 1024), "threads",
                "be an integer in [1, 1024] or None", repr(threads))
        self.bundle, self.device, self.threads, self.precision = bundle, device, threads or granted_threads(), precision
        self.seconds, self._may_fall_back, self._lock, self._drawing = {}, engine == AUTO and max_memory is None, threading.RLock(), False
        check_limit(max_memory)
        size = sum(f.size for f in bundle.manifest.files.values())
        load_engine(engine if engine != AUTO else "onnxruntime")         # installed at all?
        self._compiled = find_compiled(bundle, max_memory) if engine == AUTO else None
        if engine in BACKENDS:
            self._compiled = CompiledEngines(bundle, engine, limit=max_memory)
        self._asked_device = self._others_device = device
        if self._compiled:
            self._others_device = "cpu"     # where graphs without an engine run
            self.engine, self.device, self._engine_class = self._compiled.backend, "cuda", load_engine("onnxruntime")
        else:
            self.engine = choose_engine(device, size) if engine == AUTO else engine
            self._engine_class = load_engine(self.engine)
        self._keeps = self._stages_to_keep(keep, max_memory)
        whole, on_gpu = self._keeps == ALL, max_memory is not None and self.device == "cuda"
        self._budget = DeviceBudget(bundle, max_memory, whole, sessions=self._compiled is None) if on_gpu else \
            Budget(bundle, max_memory, whole, ENGINES[self.engine][2], self._loading())
        self._engines, self._kept = {}, Recent(16 if self._keeps else 4)
        self._schedule_config = bundle.json("schedule.json")
        if warm:
            self.warm_up()
        elif warm is None and self._compiled and self._keeps:
            with contextlib.suppress(PidiffError):      # a picture that needs it will say so
                self.warm_up()

    @classmethod
    def from_bundle(cls, path=None, engine=AUTO, device="cpu", threads=None, verify=True, precision="auto", keep=None,
                    max_memory=None, require_signature=None, warm=None):
        """Open a bundle (None: the shipped `mini`) for an engine and a device.

        engine: "onnxruntime", "openvino", "tensorrt-rtx" or "tensorrt" (graphs that have such an engine in the bundle; the
        others run on ONNX Runtime), or "auto": the bundle's engines where they run on the GPU that is here; OpenVINO where
        it is installed, on x86-64 processors, for bundles of 512 MiB and more; else ONNX Runtime. device: of what runs on
        ONNX Runtime. threads: cores to use, None for all that there are, or that the container has time for. verify=False skips the hashes, but those of engines.
        require_signature: a public key (.pub file or its second line) that the bundle must be signed by.
        precision: "full" computes in no fewer bits than the bundle was exported in; "auto" lets OpenVINO run UNet and VAE
        decoder in bfloat16 where the processor has it, and ONNX Runtime the UNet's long self-attention (fused bundles),
        which changes pictures slightly.
        keep: True keeps every graph loaded for the next picture, False only those of the stage at work (faces, text, identity,
        denoising, decoding). None is False with max_memory; else on a graphics card what a picture needs stays, not what reads a photo; on the
        processor, where there is the memory, and on a GPU that shares it (Jetson) what takes longest to load, UNet and VAE decoder. max_memory: bytes that this process shall not
        exceed, or where a GPU draws its part of the GPU's memory; on the CPU more pictures than fit are made one batch after another. Work that does not fit is refused.
        warm: True calls `warm_up` before this returns, with the bundle's own options; None does where engines of TensorRT are kept.
        Raises BundleError, EngineError.
        """
        return cls(Bundle.open(path, verify, require_signature), engine, device, threads, precision, keep, max_memory, warm)

    @cached_property
    def directions(self):
        """Edit directions of the bundle: name -> [L,512] float32, one step = one standard deviation."""
        return self.bundle.directions()

    @in_turn
    def enroll(self, photo, select="only"):
        """Return the Identity of the person in a photo: a PNG, JPEG or WebP path, or an RGB uint8 array [H,W,3].

        select: "only" refuses several faces, "largest" takes the largest. Raises FaceError in one sentence.
        """
        with self._stage("enroll"):
            self._budget.check(enroll={})
            matting = "face_matting" in self.bundle.manifest.graphs
            if not matting:
                warnings.warn("the bundle has no face_matting graph: the background stays in the identity", stacklevel=3)
            reader = FaceReader(self._graph, self.bundle.manifest.model.face_size, matting)
            face = reader.read(photo, select)
            w_plus = call(self._graph("w_plus_encoder"), {"face": to_planes(face)})["w_plus"][0].astype(np.float32)
            return Identity(w_plus, face, self.bundle.encoder_id())

    def edit(self, identity, **steps):
        """Return the identity moved along named directions: `edit(person, smile=1.5)`, in standard deviations."""
        for name, strength in steps.items():
            identity = identity.edit(name, strength, self.directions)
        return identity

    def mix(self, identity, other, levels, amount=1.0):
        """Return `identity` with W+ levels ("coarse", "middle", "fine", "finest") moved towards `other`."""
        groups, layers = self.bundle.json("adapter/config.json").get("groups"), []
        require(len(groups) == len(LEVELS), "levels", "be used with a bundle of W+ codes", f"{levels!r} with one whose identities have no levels")
        for level in [levels] if isinstance(levels, str) else levels:
            require(level in LEVELS, "levels", f"be among {', '.join(LEVELS)}", repr(level))
            start = sum(groups[:LEVELS.index(level)])
            layers += range(start, start + groups[LEVELS.index(level)])
        return identity.mix(other, layers, amount)

    @in_turn
    def prepare(self, prompt, argument="prompt"):
        """Return text_kv [1,T,2 sum(C)] for a prompt: keys and values of all layers, kept for the next call."""
        def make():
            tokenizer = self._kept.get("tokenizer", lambda: TextTokenizer(self.bundle))
            ids = tokenizer.encode(prompt, argument)
            embeds = call(self._graph("text_encoder"), {"input_ids": ids})["prompt_embeds"]
            return call(self._graph("text_conditioner"), {"prompt_embeds": embeds})["text_kv"]

        return self._kept.get(("prompt", prompt), make)

    @in_turn
    def plan(self, num_inference_steps=None, scheduler=None, eta=None):
        """Return the Plan (schedule and time table) for a number of steps, a solver and tcd's eta, kept for the next call."""
        given = self.bundle.manifest.scheduler | ({} if eta is None else {"eta": eta})
        steps, solver = _first(num_inference_steps, given.get("num_inference_steps"), 20), _solver(scheduler, given)

        def make():
            schedule = make_schedule(self._schedule_config, solver, steps, given)
            table = call(self._graph("time_conditioner"), {"timesteps": np.asarray(schedule.timesteps)})["time_table"]
            return Plan(schedule, table)

        return self._kept.get(("plan", steps, solver, eta), make)

    @in_turn
    def fold(self, identity=None, level_scale=(1.0, 1.0, 1.0, 1.0)):
        """Return id_fold [1,F] of an Identity, level scales included; None stands for the unconditional identity."""
        model = self.bundle.manifest.model
        w_plus = np.zeros((model.w_plus_layers, model.w_plus_dim), np.float32) if identity is None else identity.w_plus
        tuning = None if identity is None else identity.tuning
        key = ("fold", hashlib.sha256(np.ascontiguousarray(w_plus)).digest(), tuple(level_scale), tuning)
        check_levels(level_scale, model.identity.num_groups)
        inputs = {"w_plus": w_plus[None], "level_scale": np.array([level_scale], np.float32)[:, :model.identity.num_groups]}

        def make():
            fold = call(self._graph("id_conditioner"), inputs)["id_fold"]
            return fold if tuning is None else tuning.add_to(fold, level_scale)

        return self._kept.get(key, make)

    @draws
    def generate(self, identity, prompt, negative_prompt="", *, preset="exact", num_inference_steps=None,
                 guidance_scale=None, guidance_interval=None, cache_interval=None, id_scale=1.0, id_start=None,
                 level_scale=(1.0, 1.0, 1.0, 1.0), id_mask=None, seed=None, num_images=None, scheduler=None, eta=None, edits=None,
                 callback=None, progress=False, batch_size=4, height=None, width=None, tiled_decode=None):
        """Make pictures of a person and return a Result.

        identity: an Identity, a list of them (then with `id_mask`), or None for nobody.
        preset: "exact", "balanced" or "fast", which choose the steps and the next three where they are None (presets.py).
        num_inference_steps, guidance_scale (1 or 0 = off), scheduler, eta (of tcd: how random its steps are, 0 to 1): None takes the bundle's own (else 20, 3.0, dpmpp_2m, 0.3).
        guidance_interval: (start, end), the part of the steps with guidance, as fractions of their number; the others follow
        the prompt without guidance and cost half.
        cache_interval: the whole UNet runs every so many steps, its outermost layers alone in the others (1 = off).
        id_start: part of the steps, from the start, without the identity. id_scale: its strength; 0 is the base model.
        level_scale: strength of the W+ levels coarse, middle, fine, finest. edits: direction -> standard deviations.
        id_mask: where each person may appear: boxes (x0, y0, x1, y1) in fractions or arrays [P,H,W] in [0,1].
        seed: one number (image i gets seed + i), a list with one per image, or None. The picture of a seed does not
        depend on num_images and batch_size (images denoised at once), but for rounding.
        callback(step, total, preview) after every step, 1 <= step <= total; True stops with Cancelled; preview() returns
        the pictures so far, uint8 [B,H,W,3]. progress: show a bar.
        height, width: pixels, None for the model's own; others where the bundle's graphs take any size. tiled_decode: decode in
        tiles that overlap, for less memory; None: where the whole picture does not fit max_memory.
        """
        self.seconds, begun = {}, time.perf_counter()
        model, defaults = self.bundle.manifest.model, self.bundle.manifest.scheduler
        chosen = resolve_preset(preset, {
            "num_inference_steps": num_inference_steps, "guidance_interval": guidance_interval,
            "cache_interval": cache_interval, "id_start": id_start}, _first(defaults.get("num_inference_steps"), 20))
        options = Options(
            chosen["num_inference_steps"], _first(guidance_scale, defaults.get("guidance_scale"), 3.0),
            _tuple(chosen["guidance_interval"]), chosen["cache_interval"], id_scale, chosen["id_start"],
            _tuple(level_scale), _solver(scheduler, defaults), eta, batch_size)
        cached = "unet_cached" in self.bundle.manifest.graphs
        require(options.cache_interval == 1 or cached, "cache_interval", "be 1 for this bundle, which has no graph unet_cached "
                "(export it again)", options.cache_interval)
        people = [self.edit(p, **(edits or {})) for p in resolve_people(identity, model.w_plus_layers, model.w_plus_dim)]
        check_levels(options.level_scale, model.identity.num_groups)
        warn_foreign(people, self.bundle)
        seeds = resolve_seeds(seed, num_images)
        shape = latent_shape(self.bundle, height, width)
        mask = resolve_mask(id_mask, len(people), *shape[1:])
        batch, at_once, tile = self._budget.batch(min(options.batch_size, len(seeds)), 1 + options.guided, len(mask), options.steps,
                                                  options.cache_interval > 1, shape[1:], self._tiles(tiled_decode, shape))
        conditions = self._conditions(options, people, mask, prompt, negative_prompt, at_once)
        with self._stage("plan"):
            plan = self.plan(options.steps, options.scheduler, options.eta)
        images, maps = [], []
        chunks, decode = self._chunks(seeds, batch, options.guided, shape, tile), partial(self._decode, tile=tile)
        try:
            with Progress(callback, progress, options.steps * len(chunks), decode) as watch:
                for latents, identity_map in self._denoised(plan, chunks, options, conditions, shape, watch):
                    images += list(decode(latents))
                    maps.append(identity_map)
        except NotFinite as e:
            self._engines = {}      # their memory is for the second look
            raise located(self.bundle, e, self._budget.room, self.threads) from None
        self.seconds["total"] = time.perf_counter() - begun
        return Result(images, None if maps[0] is None else np.concatenate(maps), seeds, self.seconds, self.engine,
                      self.device, options.scheduler, options.steps, float(options.guidance_scale))

    @in_turn
    def warm_up(self, people=1, enroll=False, **options):
        """Load and compile, and on a GPU capture, what a picture with these options of `generate` needs: the first one is as fast as the
        next ones then.

        people: how many it will show. enroll: also what reads a photo. It draws nobody: on the processor two steps, but all where steps
        differ (`guidance_interval`, `cache_interval`, other presets than exact), and on a GPU two pictures of different prompts, since what
        has run before is captured. Only what is kept stays warm. Raises what `generate` raises, PidiffError where nothing is kept, or not what
        `enroll` needs.
        """
        require(self._keeps, "keep", "be True for warm_up, which loads what is kept", False)
        require(not enroll or self._keeps == ALL, "keep", "be True for warm_up with enroll, whose graphs the first picture would let go", None)
        require(type(people) is int and 1 <= people <= MAX_PEOPLE, "people", f"be an integer in [1, {MAX_PEOPLE}]", repr(people))
        model = self.bundle.manifest.model
        alike = options.get("preset", "exact") == "exact" and not {"guidance_interval", "cache_interval"} & set(options)
        self._kept.clear()          # what would be taken from there is what is to run
        drawn = {"id_mask": [(0, 0, 1, 1)] * people, "seed": 0, **options}
        if alike and self.device == "cpu":
            drawn["num_inference_steps"] = 2
        for code, prompt in enumerate([""] if self.device == "cpu" else ["", "a photo"]):
            crowd = [Identity(np.full((model.w_plus_layers, model.w_plus_dim), code, np.float32))] * people
            self.generate(crowd, prompt, **drawn)
        if enroll:
            side = model.face_size
            for graph in (g for g in STAGES["enroll"] if g in self.bundle.manifest.graphs):
                self._graph(graph)
            call(self._graph("w_plus_encoder"), {"face": np.zeros((1, 3, side, side), np.float32)})

    def _tiles(self, tiled, shape):
        """Return what sides of tiles the decoder may work by, None for whole pictures, the best first."""
        require(tiled in (None, True, False), "tiled_decode", "be True, False or None", repr(tiled))
        free, side = is_free(self.bundle), self.bundle.manifest.model.latent_shape[1]
        require(free or not tiled, "tiled_decode", "be None or False for this bundle, whose graphs have a fixed size", True)
        smaller = [t for t in (side, side // 2) if t < max(shape[1:])] or [side // 2]
        return smaller if tiled else [None, *smaller] if free and tiled is None else [None]

    def _chunks(self, seeds, batch, guided, shape, tile):
        """Split the seeds into batches, or into what compiled engines take."""
        most = self._compiled.most_images(guided) if self._compiled else None
        batch = min(batch, most or batch)
        chunks = [seeds[i:i + batch] for i in range(0, len(seeds), batch)]
        for chunk in chunks if self._compiled else ():
            self._compiled.check_images((len(chunk), *shape) if tile is None else (1, shape[0], *(min(tile, n) for n in shape[1:])))
        return chunks

    def _conditions(self, options, people, mask, prompt, negative_prompt, at_once):
        """Return a function: number of images -> Conditions with rows [unconditional..., conditional...]."""
        with self._stage("text"):
            text = [self.prepare(prompt)]
            if options.guided:
                text.insert(0, self.prepare(negative_prompt, "negative_prompt"))
        with self._stage("identity"):
            nobody = self.fold(None, options.level_scale)
            known = np.concatenate([self.fold(p, options.level_scale) for p in people] or [nobody])
            folds = [known] if not options.guided else [np.repeat(nobody, len(known), 0), known]
        id_scale = float(options.id_scale) if people else 0.0

        def rows(count):
            return Conditions(
                np.concatenate([np.repeat(t, count, 0) for t in text]), np.repeat(np.stack(folds), count, 0),
                np.repeat(mask[None], count * len(folds), 0), id_scale, options.first_identity_step, count,
                options.guided_steps, options.cache_interval, at_once)

        return rows

    def _denoised(self, plan, chunks, options, conditions, shape, watch):
        """Yield what `_denoise` returns for every chunk: after the last one, if the UNet goes before the decoder comes."""
        each = (self._denoise(plan, chunk, options, conditions, shape, watch) for chunk in chunks)
        return each if self._keeps else list(each)

    def _denoise(self, plan, seeds, options, conditions, shape, watch):
        """Denoise one batch from its seeds' noise: (latents [B,c,h,w], identity map or None); shape [c,h,w]."""
        from pidiff import _C

        with self._stage("load"):  # an engine may compile for these shapes
            rows = conditions(len(seeds))
            cached = self._graph("unet_cached") if rows.cache_interval > 1 else None
            denoiser = make_denoiser(self._graph("unet"), plan, rows, shape, cached)
        with self._stage("denoise"):
            latents = _C.randn(seeds, shape)
            latents *= np.float32(plan.schedule.init_noise_sigma)
            identity_map = denoiser.run(latents, seeds, float(options.guidance_scale), watch.on_step)
        return latents, identity_map

    def _decode(self, latents, tile=None):
        """Decode latents [B,c,h,w] to RGB uint8 [B,H,W,3], in tiles of `tile` x `tile` latents where given."""
        engine, scale = self._graph("vae_decoder"), self.bundle.manifest.model.vae_scale_factor

        def decode(part):
            with self._stage("load"):  # an engine may compile for this batch
                planes = bind_new(engine, {"latents": part}, H=part.shape[2] * scale, W=part.shape[3] * scale)["image"]
            with self._stage("decode"):
                engine.run()
                if not np.isfinite(planes).all():
                    raise NotFinite("the VAE decoder must give finite pictures, got NaN or infinity", "vae_decoder", {"latents": part})
            return planes

        return to_image(decode(latents) if tile is None else decode_in_tiles(decode, latents, tile, scale))

    def _graph(self, name):
        """Return the engine of a graph, loaded at the first use. Others, of stages that are over and not kept, are let go."""
        stays = {STAGE_OF.get(name), *self._keeps}
        if any(STAGE_OF.get(other) not in stays for other in self._engines):
            self._engines = {other: engine for other, engine in self._engines.items() if STAGE_OF.get(other) in stays}
            give_back()
        if name not in self._engines:
            with self._stage("load"):
                try:
                    self._engines[name] = self._load(name)
                except EngineError as e:
                    if not self._may_fall_back or self.engine == "onnxruntime":
                        raise
                    self.engine, self._compiled = fall_back(self.engine, e), None
                    self.device = self._others_device = self._asked_device
                    self._engine_class = load_engine(self.engine)
                    self._engines[name] = self._load(name)
        return self._engines[name]

    def _stages_to_keep(self, keep, max_memory):
        """Return the stages whose graphs stay loaded; see `from_bundle`."""
        if keep is not None or max_memory is not None:
            return ALL if keep else ()
        if self.device != "cpu":
            return DRAWING if (gpu := find_gpu()[0]) and gpu.integrated else PICTURE
        return DRAWING if fits(self.bundle, DRAWING, self._loading(lean=False)) else ()

    def _loading(self, lean=True):
        """Return the function `loading` of memory.Predictor. It does not refer to this object, which ends with its last reference."""
        engine, hot = self._engine_class, {graph: self.precision for graph in HOT_GRAPHS}
        return lambda name, weights: engine.loading(weights, name in hot, hot.get(name, "full"), lean)

    def _load(self, name):
        if self._compiled and name in self._compiled:
            return self._compiled.load(name)
        spec, hot = self.bundle.graph(name), name in HOT_GRAPHS
        return self._engine_class(
            self.bundle.file(spec.file), spec, device=self._others_device, threads=self.threads, static=hot,
            fused=self.bundle.manifest.attention == "fused", precision=self.precision if hot else "full", **self._budget.options(name))

    @contextlib.contextmanager
    def _stage(self, name):
        """Add the time spent inside to `seconds[name]`; time of stages inside (loading) counts for those only."""
        start, inner = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            spent = time.perf_counter() - start - (sum(self.seconds.values()) - inner)
            self.seconds[name] = self.seconds.get(name, 0.0) + spent


def _first(*values):
    return next(v for v in values if v is not None)


def _tuple(value):
    return tuple(value) if isinstance(value, (list, tuple, np.ndarray)) else value


def _solver(scheduler, defaults):
    return _first(scheduler, defaults.get("solver"), "dpmpp_2m")
