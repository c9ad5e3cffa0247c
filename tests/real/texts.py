"""Texts in which tokenizers differ."""

PAGE = """\
The quick brown fox can't jump; it'LL rest. Don't — it's 12345 o'clock, 3.14159 or 1,000,000!
  Two spaces, tabs\tand\t\tmore, trailing   \n\n\n\tdef f(x: int) -> str:  # code
for (int i = 0; i < 10; ++i) { a[i] <<= 2; } // https://example.org/a?b=c&d=%20#e
Ελληνικά, русский, 中文字符和标点。日本語のテキスト、한국어, العربية, עברית, हिन्दी, ไทย
naïve café Ångström ﬁ 😀👍🏽👩‍👩‍👧‍👦🇩🇪 ❤️ ∑∫√≤ ←→ camelCaseHTTPServer SHOUTING
<tool_call>{"name": "f"}</tool_call><|im_end|> and <|nothing|> and [PAD3] and \u200b\ufeff
"""
CHAT = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "Naïve 😀 or not, how many people live there in 2024?"},
]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Tell me a story about a fox."}]
