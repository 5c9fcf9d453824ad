"""How a student answers where nobody says how: the generation config that is saved with it."""

MARK = "·"


def never_said(processor):
    """
    Special tokens that no answer may hold: the image placeholder, padding, and what opens a turn.

    A text with a second `<image>` asks for a picture that is not there, and one with a user's turn goes on to talk for
    the user. What stands behind an answer in the chat template is said: it ends the turn.

    Args:
        processor (`ProcessorMixin`): with a tokenizer, and a chat template if it has one.

    Returns:
        `list[int]`: token ids.
    """
    tokenizer = processor.tokenizer
    said = {tokenizer.eos_token_id}
    if processor.chat_template is not None:
        turns = [{"role": role, "content": [{"type": "text", "text": MARK}]} for role in ("user", "assistant")]
        behind = processor.apply_chat_template(turns).rpartition(MARK)[2]
        # read off the text: to tokenise it would change the padding that is saved with the tokenizer
        said |= {tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens if token in behind}
    image_token = tokenizer.convert_tokens_to_ids(getattr(processor, "image_token", None) or "<image>")
    unsaid = {*tokenizer.all_special_ids, image_token} - said
    return sorted(token for token in unsaid if token is not None)


def prepare_generation(model, processor):
    """
    Makes what `save_pretrained` writes fit for `generate`: with a cache, and without the tokens of [`never_said`].

    Trainers turn the cache off in the config that they save; their own steps ask for none. What the language model
    said is restored. A generation config that somebody wrote keeps the rest of its settings.

    Args:
        model (`PreTrainedModel` or `PeftModel`): changed in place.
        processor (`ProcessorMixin`): of the model.
    """
    model.config.use_cache = getattr(model.config.get_text_config(), "use_cache", True)
    config = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    unsaid = {*(config.suppress_tokens or []), *never_said(processor)} - set(ends)
    config.suppress_tokens = sorted(unsaid) or None
    if config._from_model_config:  # of a model's config as it was, and no longer to be read from it
        config._from_model_config = False
        config.use_cache = model.config.use_cache
