"""The stages of `pidiff-train`: what each one reads from the model folder, trains, and writes there."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from ..checkpoint import load_strict, read_tensors, save_weights
from ..config import ADAPTER_MINI, W_PLUS_MINI, save_config
from ..data.people import People, load_people
from ..model import MINI_SCHEDULER, Model, load_encoder, load_model, load_vae, scale_factor, with_w_plus
from ..unet import set_processors
from .adapter import AdapterLoss
from .common import Trainer, to_tensor
from .samples import sample_sheet

PRINCIPAL_DIRECTIONS = 6
NEED_EXACT_CODES = ("encoder", "mapper", "isolate")
SIZES = {"vae": 128, "encoder": W_PLUS_MINI.input_size, "matting": 128, "mapper": 128, "base": 128, "adapter": 128, "isolate": 128, "localise": 128,
         "decoder": 128, "distill": 128}


def _trainer(args, model, export, sample=None, name: str | None = None) -> Trainer:
    return Trainer(model, copy.deepcopy(model), args.config, args.model / ".state" / (name or args.stage), export, sample)


def _start_from(module: torch.nn.Module, file: Path) -> bool:
    """Begin with the folder's weights where it has any (a copy of a bundle will do); a state.pt goes before them."""
    if not file.is_file():
        return False
    state = read_tensors(file)
    if not any(k.startswith("text_model.") for k in module.state_dict()):       # transformers 5 has dropped the prefix
        state = {k.removeprefix("text_model."): v for k, v in state.items()}
    load_strict(module, state, file.parent.name)
    return True


def train_vae(args, people: People) -> None:
    from ..autoencoder import MINI_VAE, PatchAutoencoder
    from .vae import VaeLoss, reconstruction_psnr, set_rotation
    model, file = PatchAutoencoder(MINI_VAE), args.model / "vae" / "diffusion_pytorch_model.safetensors"
    if not _start_from(model, file):
        model.init_from_patches(to_tensor(people.images[::max(1, len(people) // 1200)]))
    model = model.to(args.config.device, memory_format=torch.channels_last)

    def export(ema, _):
        save_weights(ema, file, torch.float16)
        save_config(ema.config, args.model / "vae" / "config.json")

    trainer = _trainer(args, model, export)
    loss = VaeLoss(model, people, args.config.batch_size, device=args.config.device)
    trainer.run(loss)
    set_rotation(trainer.ema, loss)
    export(trainer.ema, trainer.step)
    held_out = load_people(args.data, 128, "validation", limit=96).images
    print(f"held-out reconstruction: {reconstruction_psnr(trainer.ema.cpu(), held_out):.2f} dB")


def train_encoder(args, people: People) -> None:
    if args.with_mapper:
        return train_autoencoder(args, people)
    from ..w_plus_encoder import WPlusEncoder
    from .face import EncoderLoss
    from .mapper import load_renderer
    model, file = WPlusEncoder(W_PLUS_MINI), args.model / "w_plus_encoder" / "model.safetensors"
    if not _start_from(model, file):
        model.init_main_code(torch.from_numpy(people.w))
    model.latent_avg.copy_(torch.from_numpy(people.mean).expand_as(model.latent_avg))
    model = model.to(args.config.device, memory_format=torch.channels_last)

    def export(ema, _):
        save_weights(ema, file, torch.float16)
        save_config(ema.config, args.model / "w_plus_encoder" / "config.json")

    trainer = _trainer(args, model, export)
    mapper = args.model / "mapper" / "model.safetensors"
    renderer = load_renderer(mapper).to(args.config.device) if mapper.is_file() else None
    trainer.run(EncoderLoss(model, people, args.config.batch_size, args.config.device, renderer))
    _finish_encoder(args, people, trainer.ema)


def _finish_encoder(args, people: People, encoder: torch.nn.Module) -> None:
    """Write the directions that go with a trained encoder, and say what it does on held-out people."""
    from .face import encoder_scores
    save_file(edit_directions(people, encoder.cpu().eval()), args.model / "directions.safetensors")
    print("held-out", encoder_scores(encoder, load_people(args.data, SIZES["encoder"], "validation")))


def edit_directions(people: People, encoder: torch.nn.Module) -> dict[str, torch.Tensor]:
    """name -> [L, 512], one unit = one standard deviation: the data's directions over its pictures, and the first
    principal components of the encoder's own main codes, `pc1` and so on (GANSpace, arXiv 2004.02546)."""
    from .base import encoder_bank
    moves = {name: unit * ((people.w - people.mean) @ unit).std() for name, unit in people.directions.items()}
    some = slice(None, None, max(1, len(people) // 4000))
    codes = encoder_bank(encoder, dataclasses.replace(people, images=people.images[some], masks=people.masks[some]))[:, 0]
    _, values, components = np.linalg.svd(codes - codes.mean(0), full_matrices=False)
    for i in range(min(PRINCIPAL_DIRECTIONS, len(values))):
        moves[f"pc{i + 1}"] = components[i] * values[i] / len(codes) ** 0.5
    levels = encoder.config.num_styles
    return {name: torch.from_numpy(move.astype(np.float32)).expand(levels, -1).contiguous() for name, move in moves.items()}


def train_matting(args, people: People) -> None:
    from ..matting import FaceMatting
    from .face import MattingLoss
    model, file = FaceMatting(), args.model / "face_matting" / "model.safetensors"
    _start_from(model, file)
    model = model.to(args.config.device, memory_format=torch.channels_last)
    trainer = _trainer(args, model, lambda ema, _: save_weights(ema, file, torch.float16))
    trainer.run(MattingLoss(model, people, args.config.batch_size, args.config.device))


def encoder_codes(args, people: People, folder: Path | None = None):
    """The trained encoder's codes and held-out errors, or None before the encoder stage. folder: in place of MODEL."""
    from .base import EncoderCodes, encoder_bank
    folder = folder or args.model
    if not (folder / "w_plus_encoder" / "config.json").is_file():
        if people.w is None:
            raise ValueError(f"model must have w_plus_encoder/ to train on photos, got none in {folder}")
        print("no w_plus_encoder/ in the model yet: training on exact codes only")
        return None
    encoder = load_encoder(folder / "w_plus_encoder").to(args.config.device)
    if people.w is None:
        return EncoderCodes(encoder_bank(encoder, people), np.zeros((1, encoder.config.num_styles, 512), np.float32))
    unseen = load_people(args.data, max(128, encoder.config.input_size), "validation", args.people_limit)
    known = encoder_bank(encoder, people)
    return EncoderCodes(known, excess_errors(known - people.w[:, None], encoder_bank(encoder, unseen) - unseen.w[:, None]))


def excess_errors(known: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    """The encoder's errors [M, L, 512] on unseen people, made as small as what they exceed those on known people [N, L, 512] by:
    the known people's codes have the rest already. More noise would teach the UNet to doubt the tokens."""
    return unseen * max(0.0, 1 - np.square(known).mean() / np.square(unseen).mean()) ** 0.5


def known_codes(codes, people: People) -> np.ndarray:
    """[N, L, 512] of the training pictures: the encoder's, or exact ones before there is an encoder."""
    levels = W_PLUS_MINI.num_styles
    return np.broadcast_to(people.w[:, None], (len(people), levels, 512)) if codes is None else codes.people


def _mapper_state(file: Path) -> dict[str, torch.Tensor]:
    """The mapper's tensors in what the mapper stage or an adapter wrote."""
    return {k.removeprefix("mapper."): v for k, v in read_tensors(file).items() if k.startswith("mapper.")}


def begin_renderer(args, people: People, latents: torch.Tensor):
    """The mapper stage's model with what the folder knows of it; and whether an adapter there reads its tokens already."""
    from .mapper import RenderingMapper
    file, adapter = args.model / "mapper" / "model.safetensors", args.model / "adapter" / "model.safetensors"
    model = RenderingMapper(ADAPTER_MINI, *latents.shape[1:3])
    begun = _start_from(model, file)
    if not begun and adapter.is_file():             # go on with a bundle's mapper
        load_strict(model.mapper, _mapper_state(adapter), "adapter")
    model.mapper.latent_avg.copy_(torch.from_numpy(people.mean).expand_as(model.mapper.latent_avg))
    model.measure(latents)
    if not begun and adapter.is_file():
        some = np.linspace(0, len(latents) - 1, min(4000, len(latents))).astype(int)
        codes = torch.from_numpy(people.w[some].astype(np.float32))[:, None].expand(-1, W_PLUS_MINI.num_styles, -1)
        model.learn_to_read(codes, model.standardise(latents[torch.from_numpy(some)]))
    return model.to(args.config.device), adapter.is_file()


def train_mapper(args, people: People) -> None:
    from .mapper import MapperLoss, unexplained, white_latents
    vae, file = load_vae(args.model / "vae").to(args.config.device), args.model / "mapper" / "model.safetensors"
    latents, known = white_latents(vae, people), encoder_codes(args, people)
    model, read = begin_renderer(args, people, latents)
    trainer = _trainer(args, model, lambda ema, _: save_weights(ema, file))
    for part in model.language() if read else ():
        part.requires_grad_(False)                  # after the trainer, so that it can resume whatever was trained before
    trainer.run(MapperLoss(model, people, latents, None if known is None else known.people, args.config.batch_size, args.config.device))
    unseen = load_people(args.data, SIZES["mapper"], "validation", args.people_limit or 1000)
    w_plus = torch.from_numpy(unseen.w)[:, None].expand(-1, W_PLUS_MINI.num_styles, -1)
    print(f"held-out share unexplained: {unexplained(trainer.ema.cpu(), w_plus, white_latents(vae, unseen)):.3f}")


def train_autoencoder(args, people: People) -> None:
    """Encoder stage with the mapper: both are written."""
    from .face import AutoencoderLoss, FaceAutoencoder
    from .mapper import white_latents
    if not (args.model / "mapper").is_dir() and not (args.model / "adapter").is_dir():
        raise ValueError(f"with-mapper must be given with a mapper to train, got neither mapper/ nor adapter/ in {args.model}")
    vae = load_vae(args.model / "vae").to(args.config.device)
    latents = white_latents(vae, load_people(args.data, SIZES["mapper"], "train", args.people_limit))
    renderer, read = begin_renderer(args, people, latents)
    encoder = load_encoder(args.model / "w_plus_encoder").float().train().to(args.config.device, memory_format=torch.channels_last)
    folder, model = args.model / "w_plus_encoder", FaceAutoencoder(encoder.requires_grad_(True), renderer)

    def export(ema, _):
        save_weights(ema.renderer, args.model / "mapper" / "model.safetensors")
        save_weights(ema.encoder, folder / "model.safetensors", torch.float16)

    trainer = _trainer(args, model, export, name="encoder-with-mapper")
    for part in (*encoder.styles[1:].parameters(), *(renderer.language() if read else ())):
        part.requires_grad_(False)
    trainer.run(AutoencoderLoss(model, people, latents, args.config.batch_size, args.config.device))
    _finish_encoder(args, people, trainer.ema.encoder)


def train_base(args, people: People) -> None:
    from .base import BaseLoss, BaseOptions, build_base, save_base
    codes = encoder_codes(args, people)
    model, tokenizer = build_base(args.model, people.mean if people.w is not None else codes.people.mean((0, 1)))
    parts = (("unet", "diffusion_pytorch_model"), ("text_encoder", "model"), ("adapter", "model"))
    known = {part: _start_from(getattr(model, part), args.model / part / f"{file}.safetensors") for part, file in parts}
    if (mapper := args.model / "mapper" / "model.safetensors").is_file():
        load_strict(model.adapter.mapper, _mapper_state(mapper), "mapper")
    elif args.keep_mapper and not known["adapter"]:
        raise ValueError(f"keep-mapper must be given with a mapper to keep, got neither mapper/ nor adapter/ in {args.model}")
    mapped = mapper.is_file() or args.keep_mapper
    model.adapter.mapper.requires_grad_(not mapped)
    model = model.to(args.config.device, memory_format=torch.channels_last)
    vae = load_vae(args.model / "vae").to(args.config.device).requires_grad_(False)
    encoder = None if codes is None else load_encoder(args.model / "w_plus_encoder").to(args.config.device).requires_grad_(False)

    def whole(part) -> Model:
        return Model(part.unet, part.text_encoder, vae, tokenizer, MINI_SCHEDULER, encoder, part.adapter, {})

    trainer = _trainer(args, model, lambda ema, _: save_base(ema, args.model),
                       lambda ema: sample_sheet(whole(ema), people, known_codes(codes, people)))
    loss = BaseLoss(whole(model), people, args.config.batch_size, codes, BaseOptions(likeness=args.likeness), aligned=mapped)
    trainer.run(loss)


def _new_adapter(args) -> str | None:
    """The kind of adapter to begin with, or None to go on with the folder's."""
    begun = (args.model / ".state" / "adapter" / "state.pt").is_file()
    if args.new_adapter and not begun and (args.model / "adapter").is_dir():
        raise ValueError(f"new-adapter must be given for a model without adapter/, got one in {args.model}")
    return args.new_adapter


def train_adapter(args, people: People) -> None:
    whole, device = with_w_plus(load_model(args.model, encoder_file=args.encoder, new_adapter=_new_adapter(args))), args.config.device
    if args.encoder is not None:
        save_weights(whole.w_plus_encoder, args.model / "w_plus_encoder" / "model.safetensors", torch.float16)
        save_config(whole.w_plus_encoder.config, args.model / "w_plus_encoder" / "config.json")
    for module in (whole.unet, whole.text_encoder, whole.vae, whole.w_plus_encoder):
        module.to(device, memory_format=torch.channels_last).requires_grad_(False)
    whole.adapter.mapper.requires_grad_(not args.keep_mapper)
    if args.gradient_checkpointing:
        whole.unet.enable_gradient_checkpointing()
        whole.unet.train()                  # diffusers recomputes in training mode only; there is no dropout to switch on
    file, codes = args.model / "adapter" / "model.safetensors", encoder_codes(args, people)

    def sample(ema):
        set_processors(whole.unet, ema)
        try:
            return sample_sheet(dataclasses.replace(whole, adapter=ema), people, known_codes(codes, people))
        finally:
            set_processors(whole.unet, whole.adapter)

    def export(ema, _):
        save_weights(ema, file, torch.float16)
        save_config(ema.config, file.parent / "config.json")

    trainer = _trainer(args, whole.adapter.to(device), export, sample)
    trainer.run(AdapterLoss(whole, people, args.config.batch_size, codes, terms=args.terms))


def train_localise(args, people: People) -> None:
    from .base import BaseLoss
    from .localise import localise
    whole, device = with_w_plus(load_model(args.model)), args.config.device
    if not whole.adapter.config.has_null:
        raise ValueError("model must have an adapter with a null key (ours), got one without")
    for module in (whole.unet, whole.text_encoder, whole.vae, whole.w_plus_encoder, whole.adapter):
        module.to(device)
    torch.manual_seed(args.config.seed)
    loss = BaseLoss(whole, people, args.config.batch_size, encoder_codes(args, people))
    errors = localise(loss, args.localise, args.config.steps, np.random.default_rng(args.config.seed))
    save_weights(whole.adapter, args.model / "adapter" / "model.safetensors", torch.float16)
    print(f"log-odds of nobody: {args.localise.log_odds:+g}, with an error of {100 * max(errors) ** 0.5:.0f} % of it in the worst layer")


def train_decoder(args, people: People) -> None:
    from .base import encoder_bank
    from .decoder import DecoderLoss, DecoderOptions, finishing_error, sample_pairs
    whole, device = with_w_plus(load_model(args.model)), args.config.device
    for module in (whole.unet, whole.text_encoder, whole.adapter, whole.vae, whole.w_plus_encoder):
        module.to(device).requires_grad_(False)
    vae, options = whole.vae, DecoderOptions()
    if args.people_limit:
        options = dataclasses.replace(options, pictures=args.people_limit)
    codes = known_codes(encoder_codes(args, people), people)
    pairs = sample_pairs(whole, people, codes, options, args.config.seed)
    unseen = load_people(args.data, SIZES["decoder"], "validation", 200)
    held_out = sample_pairs(whole, unseen, encoder_bank(whole.w_plus_encoder, unseen), dataclasses.replace(options, pictures=200), 1)
    print(f"held-out error before: {finishing_error(vae, held_out):.2f} of 255")
    for part in (vae.patch_out, vae.decoder):
        part.requires_grad_(True)
    trainer = _trainer(args, vae.to(memory_format=torch.channels_last),
                       lambda ema, _: save_weights(ema, args.model / "vae" / "diffusion_pytorch_model.safetensors", torch.float16))
    trainer.run(DecoderLoss(vae, whole.w_plus_encoder, pairs, args.config.batch_size, device, options))
    print(f"held-out error after: {finishing_error(trainer.ema, held_out):.2f} of 255")


def _begin_student(args) -> tuple[Model, Model, Trainer]:
    """MODEL becomes a copy of the teacher with another UNet: the adapter stays, and with it who was enrolled and tuned."""
    if args.teacher is None or args.teacher.resolve() == args.model.resolve():
        raise ValueError(f"teacher must be another model folder than model, got {args.teacher}")
    file = args.model / "unet" / "diffusion_pytorch_model.safetensors"
    student, teacher = (with_w_plus(load_model(f)) for f in (args.model if file.is_file() else args.teacher, args.teacher))
    for whole in (student, teacher):
        for module in (whole.unet, whole.text_encoder, whole.vae, whole.w_plus_encoder, whole.adapter):
            module.to(args.config.device, memory_format=torch.channels_last).requires_grad_(module is student.unet)

    def export(ema, _):
        if not file.is_file():              # which comes last
            shutil.copytree(args.teacher, args.model, dirs_exist_ok=True,
                            ignore=shutil.ignore_patterns(".state", "unet", "*.onnx", "manifest.json", "report.*"))
            file.parent.mkdir(exist_ok=True)
            shutil.copy(args.teacher / "unet" / "config.json", file.parent)
        save_weights(ema, file, torch.float16)

    return student, teacher, _trainer(args, student.unet, export)


def train_distill(args, people: People) -> None:
    from .distill import DistillLoss
    student, teacher, trainer = _begin_student(args)
    trainer.run(DistillLoss(student, teacher, people, args.config.batch_size, encoder_codes(args, people, args.teacher), args.distill))
    print(f"export it with: pidiff-export {args.model} BUNDLE --solver ddim --steps {args.distill.few_steps} --guidance-scale 1")


def train_isolate(args, people: People) -> None:
    from ..autoencoder import PatchAutoencoder
    from .isolate import IsolateLoss
    student, teacher, trainer = _begin_student(args)
    if not isinstance(student.vae, PatchAutoencoder):       # whose latents have a linear way to pixels
        raise ValueError(f"teacher must have the autoencoder of mini, got {type(student.vae).__name__}")
    trainer.run(IsolateLoss(student, teacher, people, args.config.batch_size, encoder_codes(args, people, args.teacher), args.isolate))


def picture_size(args) -> int:
    """Pixels of the pictures that a stage trains on; the adapter stage takes the base model's."""
    folder = args.teacher or args.model
    unet = folder / "unet" / "config.json"
    if args.stage not in ("adapter", "localise", "isolate", "distill") or not unet.is_file():
        return SIZES[args.stage]
    return json.loads(unet.read_text())["sample_size"] * scale_factor(load_vae(folder / "vae"))


STAGES = {"vae": train_vae, "encoder": train_encoder, "matting": train_matting, "mapper": train_mapper, "base": train_base, "adapter": train_adapter,
          "isolate": train_isolate, "localise": train_localise, "decoder": train_decoder, "distill": train_distill}
