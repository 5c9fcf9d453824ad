"""A LLaVA's three ONNX graphs, with the names of inputs, outputs and axes that transformers.js gives and reads."""

import contextlib
import inspect
import logging
import warnings

import torch
from torch import nn
from torch.export import Dim
from transformers.cache_utils import DynamicCache

from llava_mod_hf.model.modeling_llava_mod import project

# Names of axes are read: transformers.js gives `batch_size` its value in an empty cache, and any other name 0.
BATCH, SEQUENCE, PAST = "batch_size", "sequence_length", "past_sequence_length"

CHOICES = "expert_choices"

# By name, since they are of this package or of a checkpoint's own code.
EXPERTS = ("LlavaModExperts", "LlavaModLowRankExperts")
ROUTER = "LlavaModTopKRouter"


@torch.library.custom_op("llava_mod::last_rows", mutates_args=())
def last_rows(hidden_states: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """The last `number` positions of `hidden_states (batch, sequence, width)`, of 0 all."""
    return hidden_states[:, -int(number.item()) :].clone()


@last_rows.register_fake
def _(hidden_states, number):
    kept = torch.library.get_ctx().new_dynamic_size()
    return hidden_states.new_empty(hidden_states.shape[0], kept, hidden_states.shape[2])


def _last_rows_in_onnx():
    """A slice from `-number`; in PyTorch, a length that depends on a value would be a size of its own in every line."""
    from onnxscript import opset18 as op

    def translate(hidden_states, number):
        first = op.Reshape(op.Neg(number), op.Constant(value_ints=[1]))
        return op.Slice(hidden_states, first, op.Constant(value_ints=[2**62]), op.Constant(value_ints=[1]))

    return {torch.ops.llava_mod.last_rows.default: translate}


class VisionEncoder(nn.Module):
    """`pixel_values (images, channels, height, width)` → `image_features (images, features, width)`."""

    def __init__(self, model):
        super().__init__()
        self.config, self.tower = model.config, model.model.vision_tower
        self.projector = model.model.multi_modal_projector

    # as `LlavaModel.get_image_features`, which returns a list with an entry per image, whose length a graph would fix
    def forward(self, pixel_values):
        hidden_states = self.tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        layers = self.config.vision_feature_layer
        first = 1 if self.config.vision_feature_select_strategy == "default" else 0  # without the class token
        chosen = [hidden_states[layer][:, first:] for layer in ([layers] if isinstance(layers, int) else layers)]
        return self.projector(torch.cat(chosen, dim=-1))


class Decoder(nn.Module):
    """Vectors and a cache → logits, the longer cache and, with experts, which were chosen for each token."""

    def __init__(self, model):
        super().__init__()
        self.head = model.lm_head
        # stock LLaVA leaves out what a family does after its head
        self.text_config = model.config.text_config if model.config.model_type == "llava_mod" else None
        self.language_model = model.model.language_model
        self.routers = [module for module in self.language_model.modules() if type(module).__name__ == ROUTER]

    def forward(self, inputs_embeds, attention_mask, position_ids, num_logits_to_keep, past_key_values):
        # without the config: layers with sliding attention would keep their window alone, and have other lengths
        cache = DynamicCache()
        for index, (key, value) in enumerate(past_key_values):
            cache.update(key, value, index)
        with _noted_choices(self.routers) as chosen:
            hidden_states = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        kept = last_rows(hidden_states, num_logits_to_keep)
        logits = self.head(kept) if self.text_config is None else project(kept, self.head, self.text_config)
        present = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        if not chosen:
            return logits, *present
        return logits, *present, torch.stack(chosen, dim=1).view(*hidden_states.shape[:2], len(chosen), -1)


@contextlib.contextmanager
def _noted_choices(routers):
    chosen = []  # per layer (batch * sequence, k)
    hooks = [router.register_forward_hook(lambda module, args, output: chosen.append(output[2])) for router in routers]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


class _Unpacked(nn.ParameterList):
    """Matrices of experts, with the shape that they have as a packed tensor."""

    @property
    def shape(self):
        return len(self), *self[0].shape


@contextlib.contextmanager
def _as_graph(model):
    """
    Inside, attention and experts are plain products, and each expert's matrices are parameters of their own.

    The student's own loop over experts is then a graph of products with constant matrices, each of the rows of the
    tokens that were sent there: no weight is copied, and a quantiser finds the matrices. `eager` attention gives a
    padded position, which sees nothing, finite values; others divide 0 by 0 there.
    """
    parts = {"": model.config, "text_config": model.config.text_config, "vision_config": model.config.vision_config}
    attention = {name: config._attn_implementation for name, config in parts.items()}
    experts = getattr(model.config.text_config, "_experts_implementation", None)
    packed = []
    try:
        model.set_attn_implementation("eager")
        for module in model.modules():
            if type(module).__name__ not in EXPERTS:
                continue
            for name, parameter in list(module.named_parameters(recurse=False)):
                packed.append((module, name, parameter))
                views = [nn.Parameter(part, requires_grad=False) for part in parameter.detach()]
                del module._parameters[name]
                setattr(module, name, _Unpacked(views))
        if packed:
            model.set_experts_implementation("eager")
        yield
    finally:
        for module, name, parameter in packed:
            delattr(module, name)
            module.register_parameter(name, parameter)
        if packed:
            model.set_experts_implementation(experts)
        model.set_attn_implementation(attention)


def _modules(model, pixel_shape):
    """`{file: (module, example inputs, dynamic axes, names of outputs)}`; no size of a graph is an example's."""
    text = model.config.text_config
    batch, sequence = Dim(BATCH, min=1, max=1024), Dim(SEQUENCE, min=1, max=2**20)
    tokens = {0: batch, 1: sequence}
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    layers = range(text.num_hidden_layers)
    past = [tuple(torch.randn(2, heads, 3, head_dim) for _ in range(2)) for _ in layers]
    grown = {0: batch, 2: Dim(PAST, min=1, max=2**20)}
    decoder = Decoder(model)
    (ids,) = inspect.signature(model.get_input_embeddings().forward).parameters
    present = [f"present.{index}.{part}" for index in layers for part in ("key", "value")]
    return {
        "vision_encoder": (
            VisionEncoder(model),
            {"pixel_values": torch.randn(2, *pixel_shape)},
            {"pixel_values": {0: batch}},
            ["image_features"],
        ),
        "embed_tokens": (
            model.get_input_embeddings(),
            {ids: torch.zeros(2, 5, dtype=torch.long)},
            {ids: tokens},
            ["inputs_embeds"],
        ),
        "decoder_model_merged": (
            decoder,
            {
                "inputs_embeds": torch.randn(2, 5, text.hidden_size),
                "attention_mask": torch.ones(2, 8, dtype=torch.long),
                "position_ids": torch.arange(3, 8).expand(2, -1),
                "num_logits_to_keep": torch.tensor(1),
                "past_key_values": past,
            },
            {
                "inputs_embeds": tokens,
                "attention_mask": {0: batch, 1: Dim.DYNAMIC},  # the sum of two others
                "position_ids": tokens,
                "num_logits_to_keep": None,
                "past_key_values": [(grown, grown) for _ in layers],
            },
            ["logits", *present, *([CHOICES] if decoder.routers else [])],
        ),
    }


@torch.no_grad()
def graphs(model, pixel_shape):
    """
    A LLaVA's graphs, one after the other.

    | graph | in | out |
    |---|---|---|
    | `vision_encoder` | `pixel_values` | `image_features (images, features, width)` |
    | `embed_tokens` | `input_ids` | `inputs_embeds (batch, sequence, width)` |
    | `decoder_model_merged` | `inputs_embeds`, `attention_mask`, `position_ids`, `num_logits_to_keep`, `past_key_values.N.key` and `.value` | `logits`, `present.N.key` and `.value`, with experts `expert_choices (batch, sequence, layers, k)` |

    Args:
        model (`PreTrainedModel`): a LLaVA in float32, dense or with this package's experts; as before in the end.
        pixel_shape (`tuple[int, int, int]`): channels, height and width of a picture.

    Yields:
        `tuple[str, onnx.ModelProto]`.
    """  # noqa: E501 (a row of a table)
    names = {"embed_tokens": ["input_ids"]}
    for name, (module, inputs, axes, outputs) in _modules(model, pixel_shape).items():
        given = [key for key in inputs if key != "past_key_values"]
        cache = [output.replace("present", "past_key_values") for output in outputs if output.startswith("present")]
        with _as_graph(model), _quiet():
            program = torch.onnx.export(
                module.eval(),
                kwargs=inputs,
                dynamic_shapes=axes,
                input_names=names.get(name, given + cache),
                output_names=outputs,
                custom_translation_table=_last_rows_in_onnx(),
                dynamo=True,
                verbose=False,
            )
        yield name, _plain_products(_named_axes(_without_traces(program.model_proto)))


def _without_traces(proto):
    """Which lines of code a node comes from, with paths of this machine, is as long as a small graph itself."""
    for part in (*proto.graph.node, *proto.graph.input, *proto.graph.output):
        del part.metadata_props[:]
    del proto.graph.value_info[:]  # of what is in between; `_plain_products` changes some shapes
    return proto


def _named_axes(proto):
    """PyTorch names the axes that follow from others by numbers of its own."""
    names = {"attention_mask": (1, "total_sequence_length"), "logits": (1, "num_logits")}
    names |= {value.name: (2, "total_sequence_length") for value in proto.graph.output if "present." in value.name}
    for value in (*proto.graph.input, *proto.graph.output):
        if value.name in names:
            axis, name = names[value.name]
            value.type.tensor_type.shape.dim[axis].dim_param = name
    return proto


def _plain_products(proto):
    """`Gemm` with a constant matrix → `MatMul`, which onnxruntime's quantisers know; the matrix is turned here."""
    from onnx import helper, numpy_helper

    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    nodes = []
    for node in proto.graph.node:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        rest = {name: value for name, value in attributes.items() if name in ("alpha", "beta", "transA")}
        if node.op_type != "Gemm" or node.input[1] not in weights or any(v not in (1.0, 0) for v in rest.values()):
            nodes.append(node)
            continue
        weight = weights[node.input[1]]
        if attributes.get("transB"):
            turned = numpy_helper.from_array(numpy_helper.to_array(weight).T.copy(), weight.name)
            weight.CopyFrom(turned)
        biased = len(node.input) == 3
        product = f"{node.output[0]}.product" if biased else node.output[0]
        nodes.append(helper.make_node("MatMul", node.input[:2], [product], name=node.name))
        if biased:
            nodes.append(helper.make_node("Add", [product, node.input[2]], node.output, name=f"{node.name}.bias"))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


@contextlib.contextmanager
def _quiet():
    """What the exporter says about operators of a library that is not installed, and about axes of the same length."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
