"""OpenAI's Responses: a request becomes a chat, the chat's answer becomes items and events."""
