"""Names used on command lines and in records. Nothing here imports JAX: help texts show them."""

# Architectures that kernels are compiled for, and those whose machine code the emulator in amdgcn/ executes.
ARCHS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201", "sm_80", "sm_90", "sm_100")
EXECUTED_ARCHS = ("gfx942", "gfx950", "gfx1100", "gfx1201")
TPU_ARCHS = ("v5e", "v6e", "v7x")  # that libtpu compiles for
INTERPRETED = "tpu"  # the machine of JAX's interpreter of TPU kernels

MODEL_STEPS = ("decode", "prefill")  # whole steps that compile --model knows
COMPILERS = ("xla", "triton")  # which turn a kernel into machine code, see proof.compilers

# The kernels of proof.ops.OPS, in the same order: kernel to (op, direction).
KERNELS = {
    "flash_attention": ("flash_attention", "forward"),
    "flash_attention_dq": ("flash_attention", "backward"),
    "flash_attention_dkv": ("flash_attention", "backward"),
    "flash_attention_bwd": ("flash_attention", "backward"),  # both in one, on TPUs
    "paged_decode_attention": ("paged_decode_attention", "forward"),
    "split_kv_merge": ("paged_decode_attention", "forward"),
    "ragged_paged_attention": ("ragged_paged_attention", "forward"),
    "quantized_matmul_few_rows": ("quantized_matmul_few_rows", "forward"),
    "quantized_matmul": ("quantized_matmul", "forward"),
    "linear_attention": ("linear_attention", "forward"),
    "linear_attention_states": ("linear_attention", "backward"),
    "linear_attention_dstates": ("linear_attention", "backward"),
    "linear_attention_dqkv": ("linear_attention", "backward"),
    "gated_linear_attention": ("gated_linear_attention", "forward"),  # a decay for each column of a key
    "gated_linear_attention_states": ("gated_linear_attention", "backward"),
    "gated_linear_attention_dstates": ("gated_linear_attention", "backward"),
    "gated_linear_attention_dqkv": ("gated_linear_attention", "backward"),
    "delta_attention": ("delta_attention", "forward"),  # linear attention with the delta rule
    "delta_attention_states": ("delta_attention", "backward"),
    "delta_attention_dstates": ("delta_attention", "backward"),
    "delta_attention_dqkv": ("delta_attention", "backward"),
    "block_sparse_attention": ("block_sparse_attention", "forward"),
    "block_sparse_attention_dq": ("block_sparse_attention", "backward"),
    "block_sparse_attention_dkv": ("block_sparse_attention", "backward"),
    "rotate_and_write": ("rotate_and_write", "forward"),  # new tokens into a cache
    "matmul_few_rows": ("matmul_few_rows", "forward"),  # floats, and what is around a product in a decode step
}
LINEAR_OPS = ("linear_attention", "gated_linear_attention", "delta_attention")
SKIPPING_OPS = (*LINEAR_OPS, "block_sparse_attention")  # that do without some scores, or all
# that have tables of their own; block-sparse attention uses those of flash attention
UNTUNED = ("flash_attention_bwd", "split_kv_merge", "rotate_and_write", "matmul_few_rows")
TUNED = tuple(name for name, (op, _) in KERNELS.items() if name not in UNTUNED and op not in SKIPPING_OPS)
TPU_KERNELS = ("flash_attention", "flash_attention_bwd", "paged_decode_attention", "ragged_paged_attention")
TPU_KERNELS += ("quantized_matmul_few_rows", "quantized_matmul")
GPU_KERNELS = tuple(name for name in KERNELS if name != "flash_attention_bwd")
OPS = tuple(dict.fromkeys(op for op, _ in KERNELS.values()))
DIRECTIONS = ("forward", "backward")
FLASH_DTYPES = ("bfloat16", "float16", "float32")
PAGED_DTYPES = (
    *FLASH_DTYPES,
    *(f"{dtype} on {pages}" for dtype in ("bfloat16", "float16") for pages in ("int8", "float8_e4m3fn", "uint8")),
)
WRITE_DTYPES = tuple(dtype for dtype in PAGED_DTYPES if not dtype.endswith("uint8"))
LINEAR_DTYPES = ("bfloat16", "float32")
PRODUCT_DTYPES = (*(dtype for dtype in PAGED_DTYPES if " on " in dtype), "int8 on int8")  # of x and the weight
ROW_DTYPES = tuple(dtype for dtype in PAGED_DTYPES if dtype != "float32")
DTYPES = tuple(dict.fromkeys((*PAGED_DTYPES, *PRODUCT_DTYPES)))
HEAD_DIMS = (64, 128, 256)  # entries of a tuning table; other head_dims use the next larger entry
BETWEEN = (80,)  # head_dims between these entries that are tested as well
GROUP_SIZES = (32, 128, 4096)  # what the products have instead of head_dims; 4096: a whole row

# Implementations of attention, jfa's and others' (measure.peers); measured directions; implementations in a model.
PEERS = ("reference", "xla", "triton", "jax.nn", "cudnn", "pallas", "tokamax", "jax-aiter", "torch", "tpu")
MEASURED = ("forward", "backward", "both")  # backward: only the gradients; both: output and gradients
IMPLEMENTATIONS = ("jfa", "reference", "xla", "triton", "tpu")  # jfa: its automatic choice
SPARSE = ("dense", "xla", "triton", "flex", "splash")  # of causal attention with a mask of tiles; dense: without it
SPARSE_MASKS = ("window", "bigbird", "vertical-slash", "top-k")
LINEAR = ("xla", "triton", "reference", "attention", "quadratic", "fla", "transformers")  # of linear attention
QUADRATIC = ("attention", "quadratic")  # whose time grows with the square of the length
RULES = ("scalar", "vector", "delta")  # a decay per head, one per column of the keys, a decay per head and beta
LINEAR_MEASURED = ("forward", "backward", "step")  # step: of decoding one token
MATRIX_PRODUCTS = "matrix products"  # a model's matrix products only: the speed limit that it is compared with

WARM_UP_CALLS = 10  # maximum number of calls before timing starts

PAGE_KINDS = ("same", "int8", "fp8", "int4")  # dtype of keys and values; same: the dtype of the queries
DATA_SETS = ("ShareGPT", "Alpaca")
BATCHING = ("static", "engine", "sequential")
LENGTHS = ("fixed", "sharegpt", "skewed")
SERVED = ("server", "engine")
LATENCIES = {  # of answers of a server, with vLLM's names
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
ENDPOINTS = ("/v1/completions", "/v1/chat/completions")

FORMATS = ("md", "csv", "json", "jsonl")
PROCESSES = 2
