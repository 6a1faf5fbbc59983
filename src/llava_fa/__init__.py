"""LLaVA-FA: large multimodal models made small enough to use."""

from llava_fa.config import FourierConfig as FourierConfig
from llava_fa.errors import FourierError as FourierError
