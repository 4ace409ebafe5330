"""
PIDiff's C++ core: attention kernels, noise, solvers and the denoising loop.
"""
from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import typing
__all__: list[str] = ['Cancelled', 'STEP_PARAMS', 'Schedule', 'Solver', 'attention', 'convolution', 'cpu_implementations', 'group_norm', 'has_cuda', 'identity_mix', 'implementation_of', 'pack_convolution', 'queue_step_input', 'queue_step_output', 'randn', 'sample', 'start_threads', 'step_table']
class Cancelled(Exception):
    """
    on_step asked sample() to stop.
    """
class Schedule:
    """
    The timesteps, noise levels and solver coefficients of one generation. Immutable.
    
    alphas_cumprod: float64, one per training timestep. Raises ValueError for impossible values.
    """
    def __init__(self, solver: str, alphas_cumprod: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex], num_inference_steps: typing.SupportsInt | typing.SupportsIndex, prediction_type: str = 'epsilon', timestep_spacing: str = 'leading', steps_offset: typing.SupportsInt | typing.SupportsIndex = 0, use_karras_sigmas: bool = False, final_sigmas_type: str = 'zero', set_alpha_to_one: bool = True, original_inference_steps: typing.SupportsInt | typing.SupportsIndex = 50, timestep_scaling: typing.SupportsFloat | typing.SupportsIndex = 10.0, eta: typing.SupportsFloat | typing.SupportsIndex = 0.3) -> None:
        ...
    def __len__(self) -> int:
        ...
    def __repr__(self) -> str:
        ...
    @property
    def init_noise_sigma(self) -> float:
        """
        The first latents are this times unit noise.
        """
    @property
    def needs_noise(self) -> bool:
        """
        Whether steps draw fresh noise (euler_ancestral, lcm, tcd).
        """
    @property
    def prediction_type(self) -> str:
        ...
    @property
    def sigmas(self) -> numpy.typing.NDArray[numpy.float32]:
        """
        float32 [N + 1]: sqrt((1 - a) / a) per step, then where the schedule ends.
        """
    @property
    def solver(self) -> str:
        ...
    @property
    def timestep_spacing(self) -> str:
        ...
    @property
    def timesteps(self) -> numpy.typing.NDArray[numpy.float32]:
        """
        float32 [N]: what the model is conditioned on.
        """
class Solver:
    """
    Steps a Schedule by hand: step 0 starts afresh, then 1, 2, ... in order.
    """
    def __init__(self, schedule: Schedule) -> None:
        ...
    def scale_model_input(self, step: typing.SupportsInt | typing.SupportsIndex, latents: typing.Annotated[numpy.typing.ArrayLike, numpy.float32]) -> numpy.typing.NDArray[numpy.float32]:
        """
        What the model is given for these latents at this step.
        """
    def step(self, step: typing.SupportsInt | typing.SupportsIndex, model_output: typing.Annotated[numpy.typing.ArrayLike, numpy.float32], latents: typing.Annotated[numpy.typing.ArrayLike, numpy.float32], noise: typing.Annotated[numpy.typing.ArrayLike, numpy.float32] | None = None) -> tuple[numpy.typing.NDArray[numpy.float32], numpy.typing.NDArray[numpy.float32]]:
        """
        Returns (the next latents, the clean prediction); float32 arrays of one shape throughout.
        """
def attention(q: numpy.ndarray, k: numpy.ndarray, v: numpy.ndarray, num_heads: typing.SupportsInt | typing.SupportsIndex, implementation: str = 'auto', out: numpy.ndarray | None = None, threads: typing.SupportsInt | typing.SupportsIndex = 0) -> numpy.ndarray:
    """
    softmax(q k^T / sqrt(C / num_heads)) v per head.
    
    q [B, S, C], k and v [B, T, C], float32, float16 or bfloat16 (ml_dtypes' or its bits as uint16), contiguous along
    the last axis; returns [B, S, C] in the same dtype: `out` if given, which may not overlap the others. threads: at
    most so many of the pool's (`start_threads`), 0 for all. Arithmetic is float32, but for
    implementation="avx512bf16" and "amx", which round the operands of both products to bfloat16, and "low", which is
    one of these from 512 keys on where that is faster ("amx" where it runs, else "avx512bf16" on AMD's processors),
    else "auto".
    """
def convolution(x: numpy.ndarray, packed: numpy.ndarray, bias: numpy.ndarray, residual: numpy.ndarray | None = None, upsample: bool = False, stride: typing.SupportsInt | typing.SupportsIndex = 1, implementation: str = 'auto', out: numpy.ndarray | None = None, threads: typing.SupportsInt | typing.SupportsIndex = 0) -> numpy.ndarray:
    """
    3 x 3 convolution with padding 1, or 1 x 1.
    
    x [B, H, W, C], float32 or bfloat16 (ml_dtypes' or its bits as uint16), packed of `pack_convolution` for the same implementation, bias
    [O] float32 -> [B, H, W, O] in x's dtype, plus residual, which has the same shape: `out` if given, which may be residual and not
    overlap x. H and W are even by Winograd's way and with a stride of 2. upsample: x is [B, H / 2, W / 2, C], and every pixel of it
    four. stride: 2 for [B, H / 2, W / 2, O]. threads: as in `attention`. implementation: "reference" (clear loops), one that
    computes in float32 ("auto" takes the last), "avx512bf16" or "amx", which round what is multiplied to bfloat16, or "low",
    one of these two where that is faster than float32, else "auto".
    """
def cpu_implementations() -> list[str]:
    """
    CPU implementations that run on this machine, slowest first; "auto" takes the last that computes in float32.
    """
def group_norm(x: numpy.ndarray, weight: numpy.ndarray, bias: numpy.ndarray, num_groups: typing.SupportsInt | typing.SupportsIndex, shift: numpy.ndarray | None = None, silu: bool = False, epsilon: typing.SupportsFloat | typing.SupportsIndex = 9.999999747378752e-06, implementation: str = 'auto', out: numpy.ndarray | None = None, threads: typing.SupportsInt | typing.SupportsIndex = 0) -> numpy.ndarray:
    """
    Group normalisation (arXiv 1803.08494) of x + shift, over positions and each group's channels; then SiLU if `silu`.
    
    x [B, S, C], float32, float16 or bfloat16 (ml_dtypes' or its bits as uint16), shift [1 or B, C] in the same dtype, weight and
    bias [C] float32; returns [B, S, C] in x's dtype: `out` if given, which may be x. threads: as in `attention`. All
    implementations compute in float32; "auto" takes the last.
    """
def has_cuda() -> bool:
    """
    Whether CUDA kernels were compiled in and a device is there to run them.
    """
def identity_mix(h: numpy.ndarray, y: numpy.ndarray, a: numpy.ndarray, v_id: numpy.ndarray, mask: numpy.ndarray, scale: numpy.ndarray, num_heads: typing.SupportsInt | typing.SupportsIndex, has_null: bool, implementation: str = 'auto') -> tuple[numpy.ndarray, numpy.ndarray]:
    """
    The folded identity term with its residual add: h + scale * sum_p mask_p * softmax(y a_p) v_p, per head.
    
    h and y [B, S, C], a [B, P, C, num_heads * T'] with T' = T + 1 (null key last) or T, v_id [B, P, T, C],
    mask [B, P, S], scale [B]. Returns (out [B, S, C], id_mass [B, P, S]): id_mass is the probability that went
    to real identity tokens, averaged over heads, and zero without a null key.
    """
def implementation_of(name: str) -> str:
    """
    What "auto" or "low" stands for on this machine where nothing is too small for rounding; another name as it is.
    """
def pack_convolution(weight: numpy.ndarray, implementation: str = 'auto', method: str = 'winograd') -> numpy.ndarray:
    """
    weight [O, C, K, K], float32, O a multiple of 64, C of 32, K 3 or 1 -> the weights as `convolution` takes them, float32 [*, *, *, *].
    
    method: "winograd" (K 3, stride 1, even sides) by F(2 x 2, 3 x 3) (arXiv 1509.09308), or "direct".
    """
def queue_step_input(params: typing.Annotated[numpy.typing.ArrayLike, numpy.int64], stream: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Queue what comes before the model on a CUDA stream (its handle): scaled latents, time row and id_scale of the
    step that the progress names. params int64 [len(STEP_PARAMS)]: addresses on the device and sizes, by
    STEP_PARAMS (csrc/sampler/step_cuda.h says what they are). RuntimeError without CUDA.
    """
def queue_step_output(params: typing.Annotated[numpy.typing.ArrayLike, numpy.int64], stream: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Queue what comes after the model: guidance and the solver step, exactly as sample() does them, the identity
    map's sum, the first step whose latents are not finite, and the progress to the next step.
    """
def randn(seeds: collections.abc.Iterable[int], shape: tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex], stream: typing.SupportsInt | typing.SupportsIndex = 0) -> numpy.typing.NDArray[numpy.float32]:
    """
    Gaussian noise, float32 [len(seeds), c, h, w]. Each image depends on its own seed, the stream and the
    position within it, never on the batch (Philox4x32-10).
    """
def sample(schedule: Schedule, latents: numpy.ndarray, seeds: collections.abc.Iterable[int], guidance_scale: typing.SupportsFloat | typing.SupportsIndex, model_input: numpy.ndarray, model_output: numpy.ndarray, call_engine: typing.Any, on_step: typing.Any = None, guided_steps: tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex] | None = None) -> None:
    """
    The denoising loop. latents float32 [B, c, h, w], already times init_noise_sigma, are advanced in place.
    
    Per step: writes the scaled latents to model_input [M, c, h, w] (M = 2B: unconditional rows, then conditional
    ones; M = B where no step has guidance), calls call_engine(step), which must fill model_output [M, c, h, w]
    (either buffer float32 or float16), then does guidance and the solver step in one pass, then calls
    on_step(step, latents, denoised): True stops with Cancelled. Both arrays are reused: copy what you keep.
    guided_steps (first, end): steps with guidance, first <= step < end (None: all of them, where guidance_scale is
    not 1). At every other step only the last B rows of both buffers are written and read.
    Runs without the GIL but for the callbacks. RuntimeError names the step at which latents are not finite.
    """
def start_threads() -> int:
    """
    Start the kernels' own threads, once, and return how many there are, the caller's included: PIDIFF_NUM_THREADS, else
    OMP_NUM_THREADS, else the processors that the calling thread may use. The first kernel does it otherwise.
    """
def step_table(schedule: Schedule, guidance_scale: typing.SupportsFloat | typing.SupportsIndex, guided_steps: tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex] | None = None, mapped_steps: collections.abc.Sequence[bool] = []) -> numpy.typing.NDArray[numpy.uint8]:
    """
    The coefficients of all steps as the GPU reads them, uint8 [N, 64]. guided_steps: as in sample(). mapped_steps:
    for each step whether its identity map counts for the average (none given: none does).
    """
STEP_PARAMS: tuple = ('table', 'progress', 'latents', 'previous', 'previous2', 'last', 'noise', 'model_input', 'model_output', 'time_table', 'time_row', 'id_scales', 'id_scale', 'identity_map', 'identity_sum', 'steps', 'elements', 'time_elements', 'rows', 'map_elements', 'input_bytes', 'output_bytes', 'time_bytes', 'scale_bytes', 'map_bytes')
