"""Prompts that the shipped model knows, for the page."""

PROMPTS = (
    "a large red circle left of a small blue star on a white background",
    "a small yellow triangle on a purple background",
    "a large green ring above a small orange cross on a black background",
    "a small white square right of a large purple circle on a green background",
    "a large blue cross below a small red ring on a yellow background",
)
FIRST = PROMPTS[0]
