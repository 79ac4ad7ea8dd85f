"""Continuous batching over one pool of pages: requests, the scheduler, and the engine that runs its steps."""

from jfa_models.engine.engine import Engine as Engine
from jfa_models.engine.engine import EngineMetrics as EngineMetrics
from jfa_models.engine.replicas import Replicas as Replicas
from jfa_models.engine.replicas import engine_of as engine_of
