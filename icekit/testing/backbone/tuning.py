"""Training the noise predictor, and putting it back."""

from __future__ import annotations

from typing import get_args

import torch
from PIL import Image

from icekit.protocols import FineTuning, Trained
from icekit.testing.asserting import assert_differ, assert_same, assert_same_picture, generator_of, refused
from icekit.testing.backbone.common import needs, predicted_by
from icekit.testing.subjects import BackboneUnderTest


def a_lora_adapter(subject: BackboneUnderTest) -> None:
    """Changes nothing before it is trained, is trained, is gone bit for bit afterwards, and what was kept of it changes
    the pictures of the call that it is handed to: as the pipeline's that loads it.
    """
    kept = _fine_tuned(subject, "lora")
    assert kept.lora and not kept.weights, "kept() of a LoRA adapter has no lora, or has weights"
    wrong = [key for key in kept.lora if not key.startswith(f"{kept.folder}.")]
    assert not wrong, f"keys of the adapter do not begin with {kept.folder!r}, the pipeline's part: {wrong[:3]}"
    picture = _tuned_picture(subject, kept)
    if subject.reference is not None:
        subject.reference.load_lora_weights(dict(kept.lora))
        try:
            expected = subject.reference_picture(subject.prompt, 5)
        finally:
            subject.reference.unload_lora_weights()
        assert_same_picture("the picture with the adapter, against the pipeline's with it", picture, expected)


def whole_weights(subject: BackboneUnderTest) -> None:
    """As a LoRA adapter, with all weights; they are those of the pipeline's own noise predictor."""
    kept = _fine_tuned(subject, "all")
    assert kept.weights and not kept.lora, "kept() of whole weights has no weights, or has an adapter"
    broad = [key for key, value in kept.weights.items() if value.is_floating_point() and value.dtype != torch.float16]
    assert not broad, f"kept() has weights that are not float16: {broad[:3]}"
    assert kept.weights_config, "kept() has no configuration of the noise predictor, as in diffusers' config.json"
    picture = _tuned_picture(subject, kept)
    if subject.reference is not None:
        part = getattr(subject.reference, kept.folder, None)
        assert part is subject.denoiser, f"the pipeline's noise predictor is not in {kept.folder!r}"
        before = {key: value.clone() for key, value in part.state_dict().items()}
        part.load_state_dict(dict(kept.weights))
        try:
            expected = subject.reference_picture(subject.prompt, 5)
        finally:
            part.load_state_dict(before)
        assert_same_picture("the picture with the weights, against the pipeline's with them", picture, expected)


def the_tuning_of_another_model_is_refused(subject: BackboneUnderTest) -> None:
    """An adapter or weights of other shapes are an InputError, and leave nothing behind."""
    backbone = subject.backbone
    needs(backbone, "fine_tuning")
    with torch.no_grad():
        before = predicted_by(subject).output
    for trained in get_args(Trained):
        with backbone.fine_tuned(trained, 1, generator_of(0)) as tuned:
            kept = tuned.kept()
        wrong = FineTuning(
            lora={key: torch.zeros(3, 3) for key in kept.lora},
            weights={key: torch.zeros(3, 3) for key in kept.weights},
            folder=kept.folder,
        )
        what, prompts = f"a tuning ({trained}) of other shapes", [subject.prompt]
        refused(what, backbone.generate, prompts, seeds=[0], steps=1, tuning=wrong)
        with torch.no_grad():
            assert torch.equal(predicted_by(subject).output, before), (
                f"the wrong tuning ({trained}) left something behind"
            )


def _fine_tuned(subject: BackboneUnderTest, trained: Trained) -> FineTuning:
    """Train a little, see ``a_lora_adapter``, and return what was kept."""
    backbone = subject.backbone
    needs(backbone, "fine_tuning")
    with torch.no_grad():
        before = predicted_by(subject).output
    with backbone.fine_tuned(trained, 2, generator_of(3)) as tuned:
        assert tuned.parameters, "there are no parameters to train"
        for key, parameter in tuned.parameters.items():
            assert parameter.dtype == torch.float32, f"{key} is {parameter.dtype}, not float32"
            parameter.requires_grad_()
        started = {key: parameter.detach().clone() for key, parameter in tuned.parameters.items()}
        prediction = predicted_by(subject).output
        assert_same("the prediction before anything is trained", prediction.detach(), before)
        prediction.square().mean().backward()
        assert any(one.grad is not None and one.grad.any() for one in tuned.parameters.values()), (
            "no gradient reaches the parameters"
        )
        generator = generator_of(4)
        with torch.no_grad():
            for parameter in tuned.parameters.values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            assert_differ("the predictions with changed parameters", predicted_by(subject).output, before)
        kept = tuned.kept()
    assert kept, "kept() is empty"
    with torch.no_grad():
        assert torch.equal(predicted_by(subject).output, before), "afterwards the prediction is not what it was before"
    torch.manual_seed(999)
    with backbone.fine_tuned(trained, 2, generator_of(3)) as tuned:
        moved = [key for key, value in started.items() if not torch.equal(value, tuned.parameters[key])]
        assert not moved, f"the same generator starts from other parameters a second time: {moved[:3]}"
    return kept


def _tuned_picture(subject: BackboneUnderTest, kept: FineTuning) -> Image.Image:
    """The picture with a tuning, which is another than without it, before and after."""

    def make(tuning: FineTuning | None) -> Image.Image:
        return subject.backbone.generate(
            [subject.prompt], seeds=[5], steps=subject.steps, guidance_scale=subject.guidance_scale, tuning=tuning
        )[0]

    plain, picture = make(None), make(kept)
    assert picture.tobytes() != plain.tobytes(), "the picture with what was kept is the picture without it"
    assert make(None).tobytes() == plain.tobytes(), "after a picture with what was kept, the plain picture is another"
    return picture
