"""Options for loading a model. Nothing here imports JAX, since the help of the command line shows these names."""

import dataclasses
from typing import Literal

DTYPES = ("float32", "bfloat16", "float16")
CACHES = ("contiguous", "paged")
KV_DTYPES = ("int8", "fp8", "int4")
QUANTIZATIONS = ("int8", "int8-dynamic", "int4", "fp8", "stored", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """How keys and values are stored.

    Attributes:
      kind: "contiguous" or "paged".
      kv_dtype: quantized dtype of the pages: "int8", "fp8" or "int4" (jfa.quant); None: the model's dtype.
      page_size: tokens per page.
    """

    kind: Literal["contiguous", "paged"] = "contiguous"
    kv_dtype: str | None = None
    page_size: int = 16

    def __post_init__(self) -> None:
        if self.kind not in CACHES:
            raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {self.kind!r}")
        if self.kv_dtype is not None and self.kind != "paged":
            raise ValueError(f"kv_dtype={self.kv_dtype!r} needs cache='paged': a contiguous cache is not quantized")
        if self.kv_dtype is not None and self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, got {self.kv_dtype!r}")
        if self.page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {self.page_size}")
