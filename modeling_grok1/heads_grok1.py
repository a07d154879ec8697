# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
Transformers' generic heads on Grok-1. They build their base model through AutoModel, which neither knows the options
of `from_pretrained` nor, in a folder with remote code, the class: each builds it here instead.
"""

from torch import nn
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from .configuration_grok1 import GrokConfig
from .modeling_grok1 import Grok1Head, Grok1Model, Grok1PreTrainedModel


class Grok1ForSequenceClassification(GenericForSequenceClassification, Grok1PreTrainedModel):
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]

    def __init__(self, config: GrokConfig, **options):
        Grok1PreTrainedModel.__init__(self, config, **options)
        self.num_labels = config.num_labels
        self.model = Grok1Model(self.config, **options)
        self.score = Grok1Head(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class Grok1ForTokenClassification(GenericForTokenClassification, Grok1PreTrainedModel):
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]

    def __init__(self, config: GrokConfig, **options):
        Grok1PreTrainedModel.__init__(self, config, **options)
        self.num_labels = config.num_labels
        self.model = Grok1Model(self.config, **options)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.1)
        self.score = Grok1Head(config.hidden_size, self.num_labels)
        self.post_init()


class Grok1ForQuestionAnswering(GenericForQuestionAnswering, Grok1PreTrainedModel):
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]

    def __init__(self, config: GrokConfig, **options):
        Grok1PreTrainedModel.__init__(self, config, **options)
        self.model = Grok1Model(self.config, **options)
        self.qa_outputs = Grok1Head(config.hidden_size, 2)
        self.post_init()


__all__ = ["Grok1ForQuestionAnswering", "Grok1ForSequenceClassification", "Grok1ForTokenClassification"]
