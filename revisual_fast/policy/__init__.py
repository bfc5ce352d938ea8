"""The policy: loading and making models, shared-prompt attention, the head. The only part that knows model internals."""
