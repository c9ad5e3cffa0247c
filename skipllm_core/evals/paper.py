"""The numbers of the paper's tables (arXiv 2404.03865), for Llama-2-7B-chat alone."""

MODEL = "Llama-2-7b-chat"

# Table 2, at about 20 %: Factoid-QA (%), MT-Bench and summaries (GPT-4's grades).
AT_20 = {
    "full model": (79.02, 7.61, 8.15),
    "SkipDecode (early exit)": (73.33, 6.53, 7.47),
    "ShortGPT (layer drop)": (70.49, 6.17, 6.33),
    "FFN-SkipLLM": (78.89, 7.55, 8.11),
}
# Table 3: Factoid-QA (%) by policy and asked ratio; the full model has 79.02.
FACTOID = {
    "random": {0.05: 77.32, 0.15: 72.96, 0.25: 49.22, 0.35: 31.07},
    "static": {0.05: 78.92, 0.15: 77.71, 0.25: 74.13, 0.35: 69.93},
    "ffn_skip": {0.05: 80.05, 0.15: 78.42, 0.25: 78.09, 0.35: 75.61},
}
# Table 4: throughput over that without skipping (9.08 tok/s), on an RTX A6000.
SPEED = {0.05: 0.92, 0.10: 1.01, 0.20: 1.13, 0.30: 1.20, 0.50: 1.37}


def is_paper_model(name: str) -> bool:
    """Whether the paper's numbers are about this model."""
    return MODEL.lower() in name.lower()
