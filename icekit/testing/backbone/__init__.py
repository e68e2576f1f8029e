"""The conformance checks of ``icekit.protocols.Backbone``; ``icekit.testing`` says how they are used."""

from __future__ import annotations

from collections.abc import Callable

from icekit.testing.backbone import facts, generating, pictures, predicting, prompts, tuning
from icekit.testing.subjects import BackboneUnderTest

CHECKS: tuple[Callable[[BackboneUnderTest], None], ...] = (
    facts.it_offers_everything,
    facts.its_facts_are_consistent,
    facts.what_it_lacks_is_true,
    pictures.latents_of_pictures,
    pictures.latents_are_the_pipelines,
    pictures.noise_grows_with_the_share,
    pictures.the_training_target_tells_picture_from_noise,
    prompts.rows_of_words,
    prompts.tokens_are_arguments,
    prompts.unknown_tokens_are_refused,
    prompts.wrong_rows_and_prompts_are_refused,
    prompts.texts_are_points,
    predicting.a_batch_is_its_parts,
    predicting.a_look_changes_nothing,
    predicting.maps_of_words,
    predicting.maps_of_pixels,
    predicting.gradients_reach_every_row,
    predicting.gradients_reach_every_row_through_the_maps,
    predicting.the_prediction_is_the_pipelines,
    predicting.a_perfect_prediction_is_the_picture,
    tuning.a_lora_adapter,
    tuning.whole_weights,
    tuning.the_tuning_of_another_model_is_refused,
    generating.pictures_are_made,
    generating.the_picture_is_the_pipelines,
    generating.saved_tokens_are_loaded_by_the_pipeline,
    generating.calls_leave_nothing_behind,
)
"""All checks of a backbone, cheap ones first."""
