"""Names that command lines take and records carry. Nothing here imports JAX: a help text shows them."""

# Architectures that kernels are compiled for, and those whose machine code the machine in amdgcn/ runs.
ARCHS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201", "sm_80", "sm_90", "sm_100")
EXECUTED_ARCHS = ("gfx942", "gfx950", "gfx1100", "gfx1201")

# The kernels of proof.ops.OPS, in its order: the op and the direction of each.
KERNELS = {
    "flash_attention": ("flash_attention", "forward"),
    "flash_attention_dq": ("flash_attention", "backward"),
    "flash_attention_dkv": ("flash_attention", "backward"),
    "paged_decode_attention": ("paged_decode_attention", "forward"),
    "ragged_paged_attention": ("ragged_paged_attention", "forward"),
}
OPS = tuple(dict.fromkeys(op for op, _ in KERNELS.values()))
DIRECTIONS = ("forward", "backward")
FLASH_DTYPES = ("bfloat16", "float16", "float32")
PAGED_DTYPES = (
    *FLASH_DTYPES,
    *(f"{dtype} on {pages}" for dtype in ("bfloat16", "float16") for pages in ("int8", "float8_e4m3fn", "uint8")),
)
HEAD_DIMS = (64, 128, 256)  # of a tuning table: the others take the next larger one's entry
BETWEEN = (80,)  # such others, that are looked at as well

# Implementations of attention, ours and others' (measure.peers); what of a call is measured; those of whole models.
PEERS = ("reference", "xla", "triton", "jax.nn", "cudnn", "pallas", "tokamax", "jax-aiter", "torch")
MEASURED = ("forward", "backward", "both")  # backward: the gradients alone; both: output and gradients
IMPLEMENTATIONS = ("jfa", "reference", "xla", "triton")  # jfa: what it chooses
MATRIX_PRODUCTS = "matrix products"  # of a model alone: the limit that it is held against

WARM_UP_CALLS = 10  # before a run is timed, at most

PAGE_KINDS = ("same", "int8", "fp8", "int4")  # of keys and values; same: the dtype of the queries
DATA_SETS = ("ShareGPT", "Alpaca")
BATCHING = ("static", "engine", "sequential")
LENGTHS = ("fixed", "sharegpt", "skewed")

FORMATS = ("md", "csv", "json", "jsonl")
PROCESSES = 2
