"""Tiny language models of many families, by the names of their classes. A folder of one is made by `save_family`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builders import SPECIAL, WORDS, save_transformers, seeded, word_tokenizer

TOKENS = len(SPECIAL) + len(WORDS)
WIDE = {"vocab_size": TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}  # fmt: skip
GROUPED = WIDE | {"num_key_value_heads": 2}
OLD = {"vocab_size": TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
PAIRED = {"vocab_size": TOKENS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
          "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
          "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3,
          "forced_eos_token_id": None}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
# name -> class, what its config says
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", OLD),
    "openai-gpt": ("OpenAIGPTLMHeadModel", OLD),
    "gptj": ("GPTJForCausalLM", OLD | {"rotary_dim": 8}),
    "gpt-bigcode": ("GPTBigCodeForCausalLM", OLD),
    "neox": ("GPTNeoXForCausalLM", WIDE),
    "llama": ("LlamaForCausalLM", GROUPED),
    "mistral, window": ("MistralForCausalLM", GROUPED | {"sliding_window": 4}),
    "gemma3, windows": ("Gemma3ForCausalLM", GROUPED | {"head_dim": 16, "sliding_window": 4}),
    "opt": ("OPTForCausalLM", {k: v for k, v in WIDE.items() if k != "intermediate_size"} | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("BloomForCausalLM", {"vocab_size": TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 2}),
    "rwkv": ("RwkvForCausalLM", {"vocab_size": TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32,
                                 "intermediate_size": 48, "context_length": 64, "bos_token_id": 2, "eos_token_id": 3}),
    "mamba": ("MambaForCausalLM", {"vocab_size": TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "mixtral": ("MixtralForCausalLM", GROUPED | {"num_local_experts": 4}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", GROUPED | EXPERTS),
    "xlm, causal": ("XLMWithLMHeadModel", {"vocab_size": TOKENS, "emb_dim": 32, "n_layers": 2, "n_heads": 2, "causal": True,
                                           "max_position_embeddings": 64}),
    "bert, decoder": ("BertLMHeadModel", WIDE | {"is_decoder": True}),
    "roberta, decoder": ("RobertaForCausalLM", WIDE | {"is_decoder": True, "pad_token_id": 1}),
    "bart, its decoder": ("BartForCausalLM", PAIRED),
}  # fmt: skip
SEEING: dict[str, tuple[str, dict[str, Any]]] = {
    "xlnet": ("XLNetLMHeadModel", {"vocab_size": TOKENS, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48}),
    "bert": ("BertLMHeadModel", WIDE),
    "roberta": ("RobertaForCausalLM", WIDE | {"pad_token_id": 1}),
    "electra": ("ElectraForCausalLM", WIDE | {"embedding_size": 32}),
    "xlm": ("XLMWithLMHeadModel", {"vocab_size": TOKENS, "emb_dim": 32, "n_layers": 2, "n_heads": 2,
                                   "max_position_embeddings": 64}),
    "gemma3, both ways": ("Gemma3ForCausalLM", GROUPED | {"head_dim": 16, "use_bidirectional_attention": True}),
}  # fmt: skip


def family(cls: str, config: dict[str, Any], seed: int = 0) -> Any:
    """A model of random weights, in evaluation mode."""
    import transformers

    with seeded(seed):
        made = getattr(transformers, cls)
        return made(made.config_class(**config)).eval()


def save_family(folder: Path, cls: str, config: dict[str, Any], tokenizer: Any = None) -> Path:
    """The same as a folder, with the word-level tokenizer."""
    return save_transformers(family(cls, config), folder, tokenizer or word_tokenizer())
