"""Rollouts on vLLM: an engine process of our own, or a server. The trainer imports vllm only where it says so."""
