"""Generation of completions: the engine protocol and the embedded engine."""
