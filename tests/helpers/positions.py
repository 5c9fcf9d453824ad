"""How many positions a language model's last FFN is asked about."""


def positions_seen(model, call):
    """What a call returns, and of how many positions the last FFN was asked, each time."""
    seen = []
    ffn = model.base_model.language_model.layers[-1].mlp
    hook = ffn.gate_proj.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:-1].numel()))
    found = call()
    hook.remove()
    return found, seen
