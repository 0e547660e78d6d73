"""The models that the benchmarks measure on: shapes of real ones, with random weights.

No time depends on the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

__all__ = ["CLASSES", "SHAPES", "Shape"]

CLASSES = 20


@dataclass(frozen=True)
class Shape:
    """A model without weights, the layers to adapt, and PEFT's name of the task."""

    config: BertConfig | LlamaConfig
    dtype: torch.dtype
    targets: str
    task_type: str

    def model(self, device: torch.device | str) -> PreTrainedModel:
        """The model with random weights, made on the device."""
        kind = BertForSequenceClassification if self.task_type == "SEQ_CLS" else LlamaForCausalLM
        with torch.device(device):
            return kind(self.config).to(self.dtype)

    def labels(self, ids: torch.Tensor) -> torch.Tensor:
        """What the model is asked for."""
        return ids[:, 0] % CLASSES if self.task_type == "SEQ_CLS" else ids


_MINILM = BertConfig(
    hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=CLASSES
)
_LLAMA = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=8192,
)
SHAPES = {
    "minilm": Shape(_MINILM, torch.float32, r"bert\.encoder\..*\.(query|key|value|dense)", "SEQ_CLS"),
    "llama": Shape(_LLAMA, torch.bfloat16, r"model\.layers\..*_proj", "CAUSAL_LM"),
}
"""All-MiniLM-L6, and a Llama of 1.1 billion parameters."""
