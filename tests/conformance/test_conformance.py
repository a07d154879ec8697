"""Transformers' own model-test mixins, subclassed for Grok-1. Run with `make conformance`."""

import sys
import unittest
from unittest import mock

from fetch import fetch


sys.path.insert(0, str(fetch()))
for _name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
    del sys.modules[_name]

import stand_ins  # noqa: E402  (before the mixins: they import what it stands in for)
import torch  # noqa: E402
from torch import nn  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

from modeling_grok1 import (  # noqa: E402
    Grok1ForCausalLM,
    Grok1ForQuestionAnswering,
    Grok1ForSequenceClassification,
    Grok1ForTokenClassification,
    Grok1Model,
    GrokConfig,
    loading_grok1,
)


# The mixins recognise a head by its class name in Transformers' own tables.
for _table, _class in {
    "MODEL_MAPPING_NAMES": Grok1Model,
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": Grok1ForCausalLM,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": Grok1ForSequenceClassification,
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": Grok1ForTokenClassification,
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": Grok1ForQuestionAnswering,
}.items():
    getattr(modeling_auto, _table)[GrokConfig.model_type] = _class.__name__

from tests import (  # noqa: E402
    test_configuration_common,
    test_expert_parallel_mixin,
    test_fsdp_mixin,
    test_modeling_common,
    test_tensor_parallel_mixin,
    test_training_mixin,
)


# The distributed mixins run for a list of model types only.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
# They count cores before they start processes; the models are so small that cores do not matter.
test_fsdp_mixin._get_available_fsdp_workers = lambda: 8


class Grok1ModelTester:
    """Tiny configs and inputs, as Transformers' CausalLMModelTester makes them for Mixtral."""

    causal_lm_class = Grok1ForCausalLM
    base_model_class = Grok1Model
    sequence_classification_class = Grok1ForSequenceClassification
    token_classification_class = Grok1ForTokenClassification
    question_answering_class = Grok1ForQuestionAnswering
    all_model_classes = (
        Grok1Model,
        Grok1ForCausalLM,
        Grok1ForSequenceClassification,
        Grok1ForTokenClassification,
        Grok1ForQuestionAnswering,
    )

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        self.batch_size, self.seq_length, self.is_training = 13, 7, True
        self.vocab_size, self.hidden_size, self.num_hidden_layers = 99, 32, 2
        self.num_attention_heads, self.num_key_value_heads, self.intermediate_size = 4, 2, 32
        self.num_labels = 3

    def get_config(self) -> GrokConfig:
        return GrokConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            num_experts=4,
            max_position_embeddings=512,
            attn_output_multiplier=(self.hidden_size // self.num_attention_heads) ** -0.5,
            embedding_multiplier_scale=self.hidden_size**0.5,
        )

    def prepare_config_and_inputs(self):
        generator = torch.Generator().manual_seed(0)
        input_ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length), generator=generator)
        attention_mask = torch.ones_like(input_ids).tril()
        return self.get_config(), input_ids, attention_mask

    def prepare_config_and_inputs_for_common(self):
        config, input_ids, attention_mask = self.prepare_config_and_inputs()
        return config, {"input_ids": input_ids, "attention_mask": attention_mask}


class Grok1ConformanceTest(
    test_modeling_common.ModelTesterMixin,
    stand_ins.GenerationTesterMixin,
    test_training_mixin.TrainingTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_expert_parallel_mixin.ExpertParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
    unittest.TestCase,
):
    all_model_classes = Grok1ModelTester.all_model_classes
    model_tester = None

    def setUp(self):
        self.model_tester = Grok1ModelTester(self)
        self.config_tester = test_configuration_common.ConfigTester(
            self, config_class=GrokConfig, hidden_size=36, num_attention_heads=6, num_key_value_heads=2
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_can_init_all_missing_weights(self):
        with mock.patch.object(loading_grok1, "check_loaded"):  # which refuses folders without weights
            super().test_can_init_all_missing_weights()

    def test_model_weights_reload_no_missing_tied_weights(self):
        with mock.patch.object(loading_grok1, "check_loaded"):
            super().test_model_weights_reload_no_missing_tied_weights()

    def test_model_get_set_embeddings(self):
        """A plain embedding is given the embedding multiplier: what is set is its weight, not the module."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            embedding = nn.Embedding(10, 10)
            model.set_input_embeddings(embedding)
            self.assertIs(model.get_input_embeddings().weight, embedding.weight)
            self.assertIsInstance(model.get_input_embeddings(), nn.Embedding)
            output = model.get_output_embeddings()
            self.assertTrue(output is None or isinstance(output, nn.Linear))
