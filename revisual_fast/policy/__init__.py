"""The policy: loading and making models, shared-prompt attention, the head. Only here are model internals known."""
