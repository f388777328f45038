"""Tests of contexts, images, adapters and encoders on a device, with one kind of memory each."""

from __future__ import annotations

from tests.devices.again import again
from tests.llama import test_adapter, test_context, test_embedding, test_encoder, test_image_rows

llama = test_context.llama
paths = test_adapter.paths
running = test_encoder.running

test_chain = again(test_context.test_the_chain_model_generates_its_text_and_ends, "prompt", ["hello"])
test_portions = again(test_context.test_a_prompt_may_be_split_into_any_batches, "name", ["llama"])
test_company = again(
    test_context.test_text_is_the_same_alone_and_beside_others, "name", ["llama", "gpt2", "mamba", "lfm2"]
)
test_fork = again(test_context.test_a_copy_continues_like_the_original, "name", ["llama", "swa"])
test_trim = again(test_context.test_trim_goes_back_to_an_earlier_position, "name", ["mrope"])
test_recurrent = test_context.test_recurrent_memory_cannot_be_trimmed_in_part
test_slide = test_context.test_slide_renumbers_the_remaining_positions
test_slide_all = again(test_context.test_sliding_everything_changes_nothing, "name", ["llama", "swa"])
test_slide_aborted = test_context.test_a_slide_survives_an_abort_of_the_next_step
test_aborted_before = again(
    test_context.test_a_batch_aborted_before_it_starts_changes_nothing, "name", ["llama", "mamba"]
)
test_numbers = test_context.test_an_abort_touches_no_batch_with_another_number
test_poolings = again(test_embedding.test_every_pooling_gives_an_embedding, "pooling", ["none", "mean"])
test_last_row = again(
    test_embedding.test_the_last_row_alone_gives_the_embedding_of_the_text, "name,rows,pooling", [("llama", 7, "last")]
)
test_beside = again(test_embedding.test_an_embedding_beside_a_generation_changes_neither, "name", ["llama"])
test_settings = again(
    test_context.test_other_settings_work_too,
    "settings",
    [{"kv_type": "q8_0"}, {"flash_attention": "on"}, {"flash_attention": "off"}, {"batch_size": 1}],
)
test_closing = test_context.test_closing_is_idempotent_and_final

test_images = again(test_image_rows.test_an_image_alone_and_beside_another, "name", ["llama", "swa"])
test_image_portions = again(test_image_rows.test_causal_rows_may_be_split_into_any_batches, "name", ["llama"])
test_image_forked = again(test_image_rows.test_copy_and_trim_know_where_an_image_ends, "name", ["mrope"])
test_image_aborted = again(test_image_rows.test_an_aborted_image_leaves_nothing, "name", ["mrope"])

test_adapter_sets = test_adapter.test_every_step_uses_the_adapters_it_names
test_adapters_come = test_adapter.test_adapters_come_and_go_while_a_context_decodes

test_source_slides = test_encoder.test_slide_renumbers_the_remaining_positions
test_source_aborted = test_encoder.test_an_abort_before_the_encoder_runs_changes_nothing
