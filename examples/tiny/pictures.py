"""Pictures of one coloured shape, for a tiny Qwen2-VL that really sees."""

from __future__ import annotations

from random import Random

import torch
from PIL import Image, ImageDraw
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil

from chat_tasks import HEAD, IGNORED, TAIL

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (235, 220, 40),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}
SHAPES = ["circle", "square", "triangle"]
QUESTIONS = ["What is in the picture?", "Describe the picture.", "What do you see?"]
SIDE = 56  # pixels; 2 x 2 merged patches


def draw_picture(colour: str, shape: str, rng: Random) -> Image.Image:
    """A shape of random size and place on a grey of random lightness."""
    grey = rng.randint(90, 170)
    image = Image.new("RGB", (SIDE, SIDE), (grey, grey, grey))
    size = rng.randint(22, 44)
    left, top = rng.randint(2, SIDE - size - 2), rng.randint(2, SIDE - size - 2)
    box = (left, top, left + size, top + size)
    fill = tuple(max(0, min(255, channel + rng.randint(-12, 12))) for channel in COLOURS[colour])
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        pen.rectangle(box, fill=fill)
    else:
        pen.polygon([(left, top + size), (left + size, top + size), (left + size / 2, top)], fill=fill)
    return image


def picture_batch(
    count: int, rng: Random, tokenizer: Qwen2Tokenizer, processor: Qwen2VLImageProcessorPil, with_answers: bool = True
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """``count`` pictures with questions as arguments of the model, padded on the right, and the answers.

    Without answers every question is the first, so that rows are equally long and can be answered by ``generate``.
    """
    things = [(rng.choice(list(COLOURS)), rng.choice(SHAPES)) for _ in range(count)]
    pixels = processor([draw_picture(*thing, rng) for thing in things], return_tensors="pt")
    answers = [f"a {colour} {shape}" for colour, shape in things]
    num_tokens = int(pixels["image_grid_thw"][0].prod()) // processor.merge_size**2
    rows, labels = [], []
    for answer in answers:
        question = rng.choice(QUESTIONS) if with_answers else QUESTIONS[0]
        prompt = f"{HEAD}<|vision_start|>{'<|image_pad|>' * num_tokens}<|vision_end|>{question}{TAIL}"
        prompt_ids = tokenizer(prompt).input_ids
        answer_ids = tokenizer(answer + "<|im_end|>").input_ids if with_answers else []
        rows.append(torch.tensor(prompt_ids + answer_ids))
        labels.append(torch.tensor([IGNORED] * len(prompt_ids) + answer_ids))
    return model_arguments(rows, labels, pixels, tokenizer), answers


def model_arguments(
    rows: list[torch.Tensor], labels: list[torch.Tensor], pixels: dict[str, torch.Tensor], tokenizer: Qwen2Tokenizer
) -> dict[str, torch.Tensor]:
    """Everything ``Qwen2VLForConditionalGeneration.forward`` wants for a batch with pictures."""
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids = pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return {
        "input_ids": input_ids,
        "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=IGNORED),
        "mm_token_type_ids": (input_ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int(),
        "pixel_values": pixels["pixel_values"],
        "image_grid_thw": pixels["image_grid_thw"],
    }
