"""Anthropic's Messages: a request becomes a chat, the chat's answer becomes blocks and events."""
