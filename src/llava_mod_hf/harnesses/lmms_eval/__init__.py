"""Our model and tasks for lmms-eval: `lmms-eval --model llava_mod --include_path` of this folder."""


def manifest():
    """What lmms-eval's entry point `lmms_eval.models` asks for: under which name it finds which class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="llava_mod", chat_class_path="llava_mod_hf.harnesses.lmms_eval.model.LlavaMod")
