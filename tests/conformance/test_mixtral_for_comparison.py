"""The same mixins on Mixtral, so that the counts of Grok-1 have something to be compared with."""

import unittest

import test_conformance as grok1
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForQuestionAnswering,
    MixtralForSequenceClassification,
    MixtralForTokenClassification,
    MixtralModel,
)


class MixtralModelTester(grok1.Grok1ModelTester):
    causal_lm_class = MixtralForCausalLM
    base_model_class = MixtralModel
    sequence_classification_class = MixtralForSequenceClassification
    token_classification_class = MixtralForTokenClassification
    question_answering_class = MixtralForQuestionAnswering
    all_model_classes = (
        MixtralModel,
        MixtralForCausalLM,
        MixtralForSequenceClassification,
        MixtralForTokenClassification,
        MixtralForQuestionAnswering,
    )

    def get_config(self) -> MixtralConfig:
        return MixtralConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.hidden_size // self.num_attention_heads,
            num_local_experts=4,
            pad_token_id=0,
            max_position_embeddings=512,
        )


class MixtralConformanceTest(
    grok1.test_modeling_common.ModelTesterMixin,
    grok1.stand_ins.GenerationTesterMixin,
    grok1.test_training_mixin.TrainingTesterMixin,
    grok1.test_tensor_parallel_mixin.TensorParallelTesterMixin,
    grok1.test_expert_parallel_mixin.ExpertParallelTesterMixin,
    grok1.test_fsdp_mixin.FSDPTesterMixin,
    unittest.TestCase,
):
    all_model_classes = MixtralModelTester.all_model_classes
    model_tester = None

    def setUp(self):
        self.model_tester = MixtralModelTester(self)
        self.config_tester = grok1.test_configuration_common.ConfigTester(
            self, config_class=MixtralConfig, hidden_size=36, num_attention_heads=6, num_key_value_heads=2
        )

    def test_config(self):
        self.config_tester.run_common_tests()
