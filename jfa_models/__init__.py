"""Decoders on Flax NNX, and everything that makes them write text."""

from jfa_models.decoding.language_model import LanguageModel as LanguageModel
from jfa_models.decoding.language_model import Session as Session
from jfa_models.decoding.outputs import CompletionOutput as CompletionOutput
from jfa_models.decoding.outputs import RequestOutput as RequestOutput
from jfa_models.decoding.params import BeamSearchParams as BeamSearchParams
from jfa_models.decoding.params import SamplingParams as SamplingParams
from jfa_models.decoding.pretrained import from_pretrained as from_pretrained
from jfa_models.engine import Engine as Engine
from jfa_models.llm import LLM as LLM
from jfa_models.model.config import DecoderConfig as DecoderConfig
from jfa_models.model.decoder import Decoder as Decoder
