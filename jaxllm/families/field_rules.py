"""What can become of a field of a `config.json`, and what becomes of those that many configurations share. Pure data.

A field that transformers' own configuration class of the architecture declares is *computed* (the family reads it),
*harmless* (no value changes what a forward pass computes), or *neutral*: refused unless it has one of the values
listed. A field that the class does not declare cannot change the reference's mathematics and is ignored with a log
line, but for those that say something else in the code a model was published with: `FOREIGN`, again with the only
values that are let through. tests/families/test_field_rules.py walks the installed transformers, and
docs/config_fields.md shows the lists; those of each architecture are in architecture_fields.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Values = Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldRules:
    """The fields of one architecture.

    Attributes:
        config_class, model_type: of transformers.
        computed: fields that the family reads.
        nullable: computed fields that may be null, beyond `NULLABLE`.
        undeclared: computed, though the class does not declare them: transformers' model code asks for them.
        harmless: fields beyond `HARMLESS` that change nothing here.
        neutral: field -> the values that are let through; null always is.
        foreign: as `neutral`, for fields that the class does not declare; stands before `FOREIGN`.
        defaults: what transformers takes where the file leaves a key out, if null means something else.
        spellings: another name of a field -> its name; where both are given, the other name wins, as in transformers.
    """

    config_class: str
    model_type: str
    computed: frozenset[str]
    nullable: frozenset[str] = frozenset()
    undeclared: frozenset[str] = frozenset()
    harmless: frozenset[str] = frozenset()
    neutral: Values = field(default_factory=dict)
    foreign: Values = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    spellings: Mapping[str, str] = field(default_factory=dict)

    def passes(self, key: str) -> bool:
        """Whether any value is let through: the family reads the field (where others make it count), or nobody does."""
        return key in self.computed or key in self.undeclared or key in self.harmless or key in HARMLESS

    def refuses_null(self, key: str) -> bool:
        """Whether transformers takes no null for this field."""
        return key in self.computed - self.nullable - NULLABLE

    def allowed(self, key: str) -> tuple[Any, ...] | None:
        """The only values that are let through, or None where the field has no such list."""
        for values in (self.neutral, self.foreign, FOREIGN):
            if key in values:
                return values[key]
        return None


# Older and newer spellings of the rotary embedding, which transformers brings together in its base class.
ROPE = frozenset("rope_parameters rope_scaling rope_theta partial_rotary_factor".split())

# Computed fields that may be null wherever they are declared.
NULLABLE = frozenset(
    "rope_parameters sliding_window layer_types attn_logit_softcapping final_logit_softcapping mlp_only_layers "
    "q_lora_rank topk_method n_inner no_rope_layers".split()
)

# What no forward pass of a decoder reads: bookkeeping, training, heads of other tasks, defaults of generation (which
# transformers takes out of the file as well), and switches of one implementation or another.
HARMLESS = frozenset(
    # transformers' base class, of this and of earlier major versions
    "architectures model_type transformers_version dtype torch_dtype output_hidden_states output_attentions "
    "return_dict use_return_dict chunk_size_feed_forward is_encoder_decoder id2label label2id num_labels problem_type "
    "name_or_path _name_or_path _commit_hash _attn_implementation _attn_implementation_autoset _experts_implementation "
    "attn_implementation attn_implementation_internal torchscript use_bfloat16 tf_legacy_loss tie_encoder_decoder "
    "cross_attention_hidden_size is_decoder finetuning_task task_specific_params tokenizer_class prefix "
    "sep_token_id decoder_start_token_id bos_token_id eos_token_id pad_token_id unk_token_id auto_map "
    "keys_to_ignore_at_inference gradient_checkpointing use_cache initializer_range transformers.js_config "
    "tie_last_hidden_states "
    # training
    "attention_dropout hidden_dropout classifier_dropout pretraining_tp router_aux_loss_coef output_router_logits "
    "router_jitter_noise aux_loss_alpha seq_aux ep_size ep_group neftune_noise_alpha "
    # generation
    "max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups "
    "diversity_penalty temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty "
    "encoder_repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
    "num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    "cache_implementation "
    # layers that predict several tokens at once: generation here does not use them
    "num_nextn_predict_layers num_mtp_layers".split()
)

_OFF = (False,)
# Fields that some published code computes with, and the values with which it computes what is computed here.
FOREIGN: Values = {
    "attention_bias": _OFF,
    "attn_bias": _OFF,
    "qkv_bias": _OFF,
    "mlp_bias": _OFF,
    "lm_head_bias": _OFF,
    "use_qk_norm": _OFF,
    "qk_norm": _OFF,
    "qk_layernorm": _OFF,
    "use_mrope": _OFF,
    "rope_interleaved": _OFF,
    "rope_interleave": _OFF,
    "use_sliding_window": _OFF,
    "sliding_window": (),
    "layer_types": (),
    "attention_chunk_size": (),
    "partial_rotary_factor": (1.0,),
    "add_cross_attention": _OFF,
    "use_bidirectional_attention": _OFF,
    "is_causal": (True,),
    "pruned_heads": ({},),
    "per_layer_config": ({},),
    "shared_expert_intermediate_size": (0,),
    "clip_qkv": (),
    "alibi": _OFF,
    "use_alibi": _OFF,
    "parallel_attn": _OFF,
    "use_parallel_residual": _OFF,
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "scale_emb": (1.0,),
    "scale_depth": (),
    "no_rope_layers": ([],),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "moe_layer_freq": (1,),
    "attention_sinks": _OFF,
    "kv_sharing_modes": ([],),
    "num_kv_shared_layers": (0,),
}
