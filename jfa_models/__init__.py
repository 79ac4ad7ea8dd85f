"""Decoders on Flax NNX, and everything that makes them write text."""

from jfa_models.config import DecoderConfig as DecoderConfig
from jfa_models.decoder import Decoder as Decoder
from jfa_models.engine import Engine as Engine
from jfa_models.generate import LanguageModel as LanguageModel
from jfa_models.generate import Session as Session
from jfa_models.generate import from_pretrained as from_pretrained
from jfa_models.llm import LLM as LLM
from jfa_models.outputs import CompletionOutput as CompletionOutput
from jfa_models.outputs import RequestOutput as RequestOutput
from jfa_models.sampling import BeamSearchParams as BeamSearchParams
from jfa_models.sampling import SamplingParams as SamplingParams
