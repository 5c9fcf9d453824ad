"""Answers of an exported folder in onnxruntime: what transformers.js does with the graphs, in Python."""

import json
from pathlib import Path

import numpy as np
from transformers import AutoProcessor, GenerationConfig

from llava_mod_hf.students.onnx_weights import DTYPES


class OnnxStudent:
    """
    The three graphs of a folder that [`~llava_mod_hf.students.onnx_export.export_onnx`] wrote.

    Args:
        folder (`str` or `Path`).
        dtype (`str`, *optional*, defaults to `"fp32"`): which files of weights.
        threads (`int`, *optional*): of onnxruntime; by default as many as there are cores.
    """

    def __init__(self, folder, *, dtype="fp32", threads=None):
        import onnxruntime

        folder = Path(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        self.sessions = {
            name: onnxruntime.InferenceSession(folder / "onnx" / f"{name}{DTYPES[dtype]}.onnx", options)
            for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
        }
        self.config = json.loads((folder / "config.json").read_text())
        self.generation_config = GenerationConfig.from_pretrained(folder)
        self.processor = AutoProcessor.from_pretrained(folder)

    def run(self, name, inputs):
        session = self.sessions[name]
        outputs = [output.name for output in session.get_outputs()]
        return dict(zip(outputs, session.run(outputs, inputs), strict=True))

    def empty_cache(self, rows):
        """Keys and values of no position."""
        sizes = {"batch_size": rows}  # other names are 0
        return {
            value.name: np.zeros([sizes.get(axis, 0) if isinstance(axis, str) else axis for axis in value.shape], "f4")
            for value in self.sessions["decoder_model_merged"].get_inputs()
            if value.name.startswith("past_key_values")
        }

    def embed(self, input_ids, pixel_values=None):
        """Vectors of token ids, image features in the places of image tokens."""
        vectors = self.run("embed_tokens", {"input_ids": input_ids})["inputs_embeds"]
        if pixel_values is not None:
            features = self.run("vision_encoder", {"pixel_values": pixel_values})["image_features"]
            vectors[input_ids == self.config["image_token_index"]] = features.reshape(-1, features.shape[-1])
        return vectors

    def decode(self, vectors, attention_mask, cache, num_logits_to_keep=1):
        """
        A step, or all of a prompt.

        Returns:
            `tuple[dict, dict]`: the outputs that are not the cache, and the cache.
        """
        positions = np.maximum(attention_mask.cumsum(axis=1) - 1, 0)[:, -vectors.shape[1] :]
        inputs = {"inputs_embeds": vectors, "attention_mask": attention_mask, "position_ids": positions}
        outputs = self.run(
            "decoder_model_merged", inputs | {"num_logits_to_keep": np.array(num_logits_to_keep)} | cache
        )
        cache = {
            name.replace("present", "past_key_values"): outputs.pop(name)
            for name in list(outputs)
            if name.startswith("present")
        }
        return outputs, cache

    def logits(self, input_ids, attention_mask, pixel_values=None):
        """`(batch, sequence, vocabulary)` of a prompt."""
        cache = self.empty_cache(len(input_ids))
        return self.decode(self.embed(input_ids, pixel_values), attention_mask, cache, 0)[0]["logits"]

    def generate(self, input_ids, attention_mask, pixel_values=None, *, max_new_tokens=16):
        """
        Greedy answers.

        Args:
            input_ids, attention_mask (`np.ndarray` of shape `(batch, sequence)`, int64): padded on the left.
            pixel_values (`np.ndarray`, *optional*).
            max_new_tokens (`int`, *optional*, defaults to 16).

        Returns:
            `tuple[np.ndarray, list[np.ndarray]]`: the new tokens `(batch, new)`, pads after the end, and of a sparse
            student the experts of each step `(batch, positions, layers, k)`.
        """
        settings = self.generation_config
        ends = np.atleast_1d(settings.eos_token_id)
        pad = settings.pad_token_id if settings.pad_token_id is not None else ends[0]
        cache, vectors = self.empty_cache(len(input_ids)), self.embed(input_ids, pixel_values)
        tokens, choices, over = [], [], np.zeros(len(input_ids), bool)
        while len(tokens) < max_new_tokens and not over.all():
            outputs, cache = self.decode(vectors, attention_mask, cache)
            choices += [outputs["expert_choices"]] if "expert_choices" in outputs else []
            logits = outputs["logits"][:, -1]
            logits[:, settings.suppress_tokens or []] = -np.inf
            tokens.append(np.where(over, pad, logits.argmax(axis=-1)))
            over |= np.isin(tokens[-1], ends)
            vectors = self.embed(tokens[-1][:, None])
            attention_mask = np.concatenate([attention_mask, np.ones_like(attention_mask[:, :1])], axis=1)
        return np.stack(tokens, axis=1), choices
