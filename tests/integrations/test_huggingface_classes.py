"""Model classes that cannot call an attention implementation are refused, wherever they are told its name."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastattn.integrations import huggingface
from fastattn.integrations.huggingface.classes import WITHOUT_SDPA, calls
from fastattn.integrations.huggingface.masks import PlannedMask, make_mask
from tests.integrations import zoo
from tests.integrations.huggingface_models import VERSION, build

huggingface.register()

ITSELF = "computes attention of its own and does not call the attention implementation: .* would change nothing"
NEVER = {
    "BloomForCausalLM": ITSELF,
    "FalconForCausalLM": ITSELF,  # a table of its own
    "GPTNeoForCausalLM": ITSELF,
    "DebertaV2ForMaskedLM": ITSELF,  # asks for no mask
    "GitForCausalLM": ITSELF,  # takes the table for images only
    "MambaForCausalLM": "has no layer that calls the attention implementation",
}


def config(name: str, **changes: Any) -> Any:
    return zoo.shrunk(getattr(transformers, name).config_class, **changes)


@pytest.mark.parametrize("name", NEVER)
def test_construction_is_refused(name: str) -> None:
    model = getattr(transformers, name)
    with pytest.raises(ValueError, match=NEVER[name]):
        model._from_config(config(name), attn_implementation="fastattn")


@pytest.mark.parametrize("name", NEVER)
def test_switching_is_refused(name: str) -> None:
    """A model that exists, by its method and by its config; both stay as they were."""
    model = getattr(transformers, name)._from_config(config(name), attn_implementation="eager")
    with pytest.raises(ValueError, match=NEVER[name]):
        model.set_attn_implementation("fastattn")
    with pytest.raises(ValueError, match=NEVER[name]):
        model.config._attn_implementation = "fastattn"
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("eager")


# Models whose Python module has a layer that calls the implementation, which they do not have.
ENCODERS: dict[str, dict[str, Any]] = {
    "LongT5EncoderModel": {"local_radius": 3},
    "LongT5EncoderModel, transient-global": {"encoder_attention_type": "transient-global", "global_block_size": 4},
    "ClapAudioModel": {
        **{"patch_embeds_hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 2], "spec_size": 64},
        **{"num_mel_bins": 16, "window_size": 4},
    },
    "PatchTSMixerModel": {"d_model": 16},
}


@pytest.mark.skipif(VERSION < (5, 20), reason="other classes in earlier versions")
@pytest.mark.parametrize("name", ENCODERS)
def test_models_of_which_only_siblings_call_it(name: str) -> None:
    """Judged by the layers that they have: built by a config that was told, built by the library, and switched."""
    model = getattr(transformers, name.split(",")[0])
    words = ITSELF.replace("computes", f"{model.__name__} computes")
    with pytest.raises(ValueError, match=words):
        model._from_config(config(model.__name__, **ENCODERS[name]), attn_implementation="fastattn")
    told = config(model.__name__, **ENCODERS[name])
    told._attn_implementation = "fastattn"
    with pytest.raises(ValueError, match=words):
        model(told)
    made = model._from_config(config(model.__name__, **ENCODERS[name]), attn_implementation="eager")
    with pytest.raises(ValueError, match=words):
        made.set_attn_implementation("fastattn")


@pytest.mark.skipif(VERSION < (5, 20), reason="other classes in earlier versions")
def test_a_model_that_runs_in_part_says_so() -> None:
    """Once, whole, however it is built; its calls do reach fastattn."""
    small = config("LongT5ForConditionalGeneration", local_radius=3)
    words = "LongT5ForConditionalGeneration runs on .* in part: its layers LongT5LocalAttention compute attention of"
    with pytest.warns(UserWarning, match=words) as caught:
        transformers.LongT5ForConditionalGeneration._from_config(small, attn_implementation="fastattn")
    assert len(caught) == 1
    model = transformers.LongT5ForConditionalGeneration._from_config(small, attn_implementation="eager")
    with pytest.warns(UserWarning, match=words):
        model.set_attn_implementation("fastattn")


class Elsewhere(torch.nn.Module):
    """A layer that calls it by way of a function and a decorator."""

    @torch.no_grad()
    def forward(self) -> Any:
        return _interface("fastattn")


class Overridden(Elsewhere):
    """One that does not call it any more."""

    def forward(self) -> Any:
        return None


class Extended(Elsewhere):
    """One that calls it still."""

    def forward(self) -> Any:
        return super().forward()


def _interface(name: str) -> Any:
    return ALL_ATTENTION_FUNCTIONS[name]


def test_which_classes_call_it() -> None:
    assert [calls(x) for x in (Elsewhere, Overridden, Extended, torch.nn.Linear)] == [True, False, True, False]


def test_a_config_before_its_models_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    told = config("BloomForCausalLM")
    monkeypatch.delitem(sys.modules, "transformers.models.bloom.modeling_bloom")
    with pytest.raises(ValueError, match="BloomConfig " + ITSELF):
        told._attn_implementation = "fastattn"


class OwnConfig(transformers.LlamaConfig):
    """Of a model in another file, with no name to find it by."""


class Subclass(transformers.LlamaForCausalLM):
    """A model of the user by inheritance."""

    config_class = transformers.LlamaConfig


def test_classes_of_the_user_that_call_it() -> None:
    own = OwnConfig(**zoo.shrunk(transformers.LlamaConfig).to_dict())
    own._attn_implementation = "fastattn"
    assert own._attn_implementation == "fastattn"
    model = Subclass._from_config(config("LlamaForCausalLM"), attn_implementation="fastattn")
    model.set_attn_implementation("eager")
    model.set_attn_implementation("fastattn")
    assert model.config._attn_implementation == "fastattn"


def test_a_model_of_the_user_with_nothing_that_calls_it() -> None:
    """A model class that is not of the library, with nothing from elsewhere that could call the table."""

    class MyModel(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.layer = torch.nn.Linear(2, 2)

    with pytest.raises(ValueError, match="MyModel has no layer that calls the attention implementation"):
        MyModel(config("LlamaForCausalLM")).set_attn_implementation("fastattn")


@pytest.mark.parametrize("name", ["Llama", "BART", "CLIP"])
def test_those_that_call_it_are_switched(name: str) -> None:
    model = build(name)
    model.set_attn_implementation("fastattn")
    assert model.config._attn_implementation == "fastattn"
    model.set_attn_implementation("eager")
    model.config._attn_implementation = "fastattn"
    assert model.config._attn_implementation == "fastattn"


@pytest.mark.skipif(VERSION < (5, 0), reason="class of transformers 5")
def test_of_several_parts_those_that_can() -> None:
    """The images' attention of GOT-OCR2 is its own; the text's is not."""
    told = config("GotOcr2ForConditionalGeneration")
    told._attn_implementation = "fastattn"
    assert told.text_config._attn_implementation == "fastattn"
    told._attn_implementation = {"text_config": "eager"}
    told._attn_implementation = {"text_config": "fastattn"}
    assert told.text_config._attn_implementation == "fastattn"
    with pytest.raises(ValueError, match="GotOcr2Config " + ITSELF):
        told._attn_implementation = {"vision_config": "fastattn", "text_config": "eager"}


# ------------------------------------------------------------------------- models that do something with their masks

COMPUTING = [
    "DeepseekV4ForCausalLM",  # concatenates a bias, in the mask's dtype
    "BigBirdPegasusForConditionalGeneration",  # some layers add the mask to scores of their own
    "DogeForCausalLM",  # adds a bias of its own, by the mask's dtype
    "Inkling2ForCausalLM",  # sinks of each query
    "MllamaForCausalLM",
    "Gemma2ForCausalLM",
]


@pytest.mark.skipif(VERSION < (5, 20), reason="classes of later versions")
@pytest.mark.parametrize("name", COMPUTING)
def test_equal_eager(name: str) -> None:
    zoo.count_calls()
    outcome = zoo.compare(zoo.classes()[name], name)
    huggingface.register()
    assert outcome.outcome == (zoo.IN_PART if name.startswith("BigBird") else zoo.EQUAL), outcome


def switched(model: Any) -> Any:
    """A copy of a model with the same weights, on fastattn."""
    other = copy.deepcopy(model)
    other.set_attn_implementation("fastattn")
    return other


@pytest.mark.skipif(VERSION < (5, 20), reason="added to scores by the model itself in earlier versions")
@pytest.mark.parametrize("shared", [False, True])
def test_beit_with_relative_position_bias(shared: bool) -> None:
    """It adds its bias to the mask, also where nothing is hidden."""
    changes = {"use_relative_position_bias": not shared, "use_shared_relative_position_bias": shared}
    small = config("BeitForImageClassification", **changes)
    model = zoo.randomised(transformers.BeitForImageClassification._from_config(small, attn_implementation="eager"))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    _check_same(model, {"pixel_values": pixels})
    biases = [x for name, x in model.named_parameters() if "relative_position_bias_table" in name]
    assert biases
    assert all(x.grad is not None and x.grad.abs().max() > 0 for x in biases)


@pytest.mark.skipif(VERSION < (5, 20), reason="its cross-attention had a class by implementation")
@pytest.mark.parametrize("masked", [False, True])
def test_mllama_cross_attention(masked: bool) -> None:
    """With the states of images, whose keys have no order; and no mask."""
    small = config("MllamaForCausalLM", num_hidden_layers=4, cross_attention_layers=[1, 3])
    model = zoo.randomised(transformers.MllamaForCausalLM._from_config(small, attn_implementation="eager"))
    ids = torch.randint(4, 60, (2, 7), generator=torch.Generator().manual_seed(3))
    states = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(4))
    inputs: dict[str, Any] = {"input_ids": ids, "cross_attention_states": states, "use_cache": False}
    if masked:
        inputs["cross_attention_mask"] = torch.where(torch.rand(2, 1, 7, 7) < 0.5, 0.0, torch.finfo(torch.float32).min)
        inputs["full_text_row_masked_out_mask"] = torch.ones(2, 1, 7, 1)
    _check_same(model, inputs)
    assert model.model.layers[1].cross_attn.q_proj.weight.grad.abs().max() > 0


@pytest.mark.skipif(VERSION < (5, 20), reason="asks for masks by other names")
def test_informer_of_which_some_layers_add_their_mask() -> None:
    sizes = {"prediction_length": 4, "context_length": 8, "d_model": 32, "encoder_layers": 2, "distil": False}
    small = transformers.InformerConfig(**sizes, lags_sequence=[1, 2], num_time_features=1, dropout=0.0)
    model = zoo.randomised(transformers.InformerModel._from_config(small, attn_implementation="eager"))
    generator = torch.Generator().manual_seed(5)
    inputs = {
        **{"past_values": torch.rand(2, 10, generator=generator), "past_observed_mask": torch.ones(2, 10)},
        **{"past_time_features": torch.rand(2, 10, 1), "future_time_features": torch.rand(2, 4, 1)},
        "future_values": torch.rand(2, 4, generator=generator),
    }
    _check_same(model, inputs)


def _check_same(model: Any, inputs: dict[str, Any]) -> None:
    """Eager and fastattn: outputs, and gradients of all parameters."""
    other = switched(model.eval())
    results = []
    for each in (model, other):
        torch.manual_seed(0)
        output: Tensor = each(**inputs)[0]
        output.square().sum().backward()
        results.append(
            {"logits": output.detach()} | {n: x.grad for n, x in each.named_parameters() if x.grad is not None}
        )
    assert zoo.difference(results[1], results[0])[0] < zoo.TOLERANCE


# ------------------------------------------------------------------------------------------- masks that are spelled out


@pytest.mark.skipif(VERSION < (5, 20), reason="classes of later versions")
@pytest.mark.parametrize("name", ["DeepseekV4ForCausalLM", "BigBirdPegasusForCausalLM"])
def test_compiled_models_that_compute_with_their_masks(name: str) -> None:
    """Compiled code gets plain tensors, of the meaning that the model expects."""
    model = zoo.randomised(zoo.build(name, zoo.configuration("causal", name), "eager"))
    inputs, real = zoo.inputs(model, "right")
    with torch.no_grad():
        expected = model(**inputs).logits[real]
        model.set_attn_implementation("fastattn")
        found = torch.compile(model, backend="eager")(**inputs).logits[real]
    torch._dynamo.reset()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(VERSION < (5, 0), reason="transformers 4 describes masks in another way")
@pytest.mark.parametrize("name", ["DeepseekV4ForCausalLM", "LlamaForCausalLM"])
def test_masks_for_compiled_steps_have_the_dtype_that_the_model_knows(name: str) -> None:
    """Numbers where its classes do not take sdpa's booleans."""
    told = config(name)
    told._attn_implementation = "fastattn"
    assert (type(told) in WITHOUT_SDPA) == (name == "DeepseekV4ForCausalLM")
    call = {"batch_size": 2, "kv_length": 6, "q_length": 1, "q_offset": 3, "config": told, "dtype": torch.float32}
    made = make_mask(**call, allow_is_causal_skip=False)
    assert not isinstance(made, PlannedMask)
    library = masking_utils.eager_mask if name == "DeepseekV4ForCausalLM" else masking_utils.sdpa_mask
    assert torch.equal(made, library(**call, allow_is_causal_skip=False))
