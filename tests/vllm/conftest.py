"""Tests that run vLLM, in an environment of its own (Makefile, `test-vllm`); elsewhere this folder is passed by."""

import os
from pathlib import Path

import pytest

from llava_fa.vllm.support import version_refusal

HERE = Path(__file__).parent

if version_refusal() is None:
    # vLLM reads them when it is imported: the engine in this process, little memory for keys and values, no network.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
else:
    collect_ignore_glob = ["test_embedded.py", "test_families.py", "test_openai.py", "test_unasked.py", "test_vllm*.py"]


def pytest_collection_modifyitems(items):
    """Warnings of vLLM, and of what it imports, are not ours to mend."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))
