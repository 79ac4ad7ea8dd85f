"""Fine-tuning: adapters (LoRA, DoRA, rsLoRA) on a base of floats or quantized weights, or all parameters of a model."""

from jfa_models.training.data import Data as Data
from jfa_models.training.data import read_data as read_data
from jfa_models.training.lora import new_adapter as new_adapter
from jfa_models.training.run import Options as Options
from jfa_models.training.run import finetune as finetune
from jfa_models.training.step import Batch as Batch
from jfa_models.training.step import Trainable as Trainable
from jfa_models.training.step import TrainState as TrainState
from jfa_models.training.step import loss_fn as loss_fn
from jfa_models.training.step import make_optimizer as make_optimizer
from jfa_models.training.step import make_train_step as make_train_step
from jfa_models.training.step import new_state as new_state
