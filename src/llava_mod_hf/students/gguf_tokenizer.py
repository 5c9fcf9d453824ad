"""A tokenizer of transformers in the words of a GGUF file."""

import json

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# How the text is cut before byte pairs are merged → llama.cpp's name for it (`src/llama-vocab.cpp`).
PRE_TOKENIZERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (WORDS % r"\p{N}",): "qwen2",
    (WORDS % r"\p{N}{1,3}",): "llama-bpe",
}


def add_tokenizer(writer, gguf, processor, model):
    """
    Writes tokens, merges, special tokens and the chat template.

    Args:
        writer (`gguf.GGUFWriter`).
        gguf (`module`).
        processor (`ProcessorMixin`).
        model (`PreTrainedModel`): whose embeddings say how many tokens there are, and whose generation config says
            which of them end an answer.

    Raises:
        ValueError: if llama.cpp would cut text into other tokens.
    """
    tokenizer = processor.tokenizer
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = _pre_tokenizer(fields)
    tokens, types = _tokens(gguf, tokenizer, model.get_input_embeddings().weight.shape[0])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = fields["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])

    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    ends = ends if isinstance(ends, list) else [ends]
    writer.add_eos_token_id(ends[0])
    if len(ends) > 1:
        writer.add_eot_token_id(ends[1])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    begins = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    writer.add_add_bos_token(begins and tokenizer.bos_token_id is not None)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    template = getattr(processor, "chat_template", None) or tokenizer.chat_template
    if template:
        writer.add_chat_template(template)


def _pre_tokenizer(fields):
    cut = fields["pre_tokenizer"] or {}
    steps = cut.get("pretokenizers", [cut])
    shape = tuple(
        step["pattern"].get("Regex") if step.get("type") == "Split" else step.get("type")
        for step in steps
        if not (step.get("type") == "ByteLevel" and not step["use_regex"])  # bytes alone, as llama.cpp always has them
    )
    exact = (
        fields["model"]["type"] == "BPE"
        and not fields["model"].get("byte_fallback")
        and not any(step.get("add_prefix_space") for step in steps)
        and (fields["normalizer"] or {}).get("type", "NFC") == "NFC"
        and shape in PRE_TOKENIZERS
    )
    if not exact:
        kind, steps = fields["model"]["type"], ", ".join(map(str, shape)) or "nothing"
        raise ValueError(
            f"The tokenizer is a {kind} that cuts text by {steps}, and GGUF files are written for byte-level BPE cut "
            f"as by {', '.join(PRE_TOKENIZERS.values())}: convert the language model with llama.cpp's own "
            "convert_hf_to_gguf.py."
        )
    return PRE_TOKENIZERS[shape]


def _tokens(gguf, tokenizer, size):
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for index in range(size):
        if index not in by_id:  # the matrix has more rows than there are tokens
            tokens.append(f"[PAD{index}]")
            types.append(gguf.TokenType.UNUSED)
            continue
        tokens.append(by_id[index])
        special = gguf.TokenType.CONTROL if index in added and added[index].special else gguf.TokenType.USER_DEFINED
        types.append(special if index in added else gguf.TokenType.NORMAL)
    return tokens, types
