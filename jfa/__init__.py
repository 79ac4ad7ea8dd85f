"""Flash attention and KV caches for JAX: arrays in, arrays out."""

from jfa.backends import Explanation as Explanation
from jfa.backends import explain as explain
from jfa.block_mask import BlockMask as BlockMask
from jfa.cache.contiguous import KVCache as KVCache
from jfa.cache.paged import PagedKVCache as PagedKVCache
from jfa.ops import dot_product_attention as dot_product_attention
from jfa.paged_ops import paged_decode_attention as paged_decode_attention
from jfa.paged_ops import ragged_paged_attention as ragged_paged_attention
from jfa.pages import PageAllocator as PageAllocator
from jfa.products import quantized_matmul as quantized_matmul
from jfa.quant import QuantizedArray as QuantizedArray
from jfa.sparse_ops import block_sparse_attention as block_sparse_attention
from jfa.types import AttentionSpec as AttentionSpec
from jfa.types import BlockConfig as BlockConfig
from jfa.types import DeviceInfo as DeviceInfo
from jfa.types import FlashConfig as FlashConfig
from jfa.types import PagedConfig as PagedConfig
from jfa.types import ProductConfig as ProductConfig
from jfa.types import UnsupportedError as UnsupportedError
