"""Flash attention and KV caches for JAX: arrays in, arrays out."""

from jfa.backends import Explanation as Explanation
from jfa.backends import explain as explain
from jfa.cache.contiguous import KVCache as KVCache
from jfa.cache.paged import PagedKVCache as PagedKVCache
from jfa.cache.state import StateCache as StateCache
from jfa.linear_ops import causal_conv as causal_conv
from jfa.linear_ops import linear_attention as linear_attention
from jfa.linear_ops import linear_attention_step as linear_attention_step
from jfa.linear_ops import ragged_causal_conv as ragged_causal_conv
from jfa.linear_ops import ragged_linear_attention as ragged_linear_attention
from jfa.ops import dot_product_attention as dot_product_attention
from jfa.paged_ops import paged_decode_attention as paged_decode_attention
from jfa.paged_ops import ragged_paged_attention as ragged_paged_attention
from jfa.pages import PageAllocator as PageAllocator
from jfa.products import quantized_matmul as quantized_matmul
from jfa.quant import QuantizedArray as QuantizedArray
from jfa.types import AttentionSpec as AttentionSpec
from jfa.types import BlockConfig as BlockConfig
from jfa.types import DeviceInfo as DeviceInfo
from jfa.types import FlashConfig as FlashConfig
from jfa.types import LinearConfig as LinearConfig
from jfa.types import LinearKernelConfig as LinearKernelConfig
from jfa.types import PagedConfig as PagedConfig
from jfa.types import ProductConfig as ProductConfig
from jfa.types import UnsupportedError as UnsupportedError
