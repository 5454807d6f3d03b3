"""The composed vision-audio-language model, its loss, its sizes and its processor."""
