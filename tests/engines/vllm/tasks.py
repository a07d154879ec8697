"""Tasks of lm-evaluation-harness on the documents that prepare.py has written, one for each kind of request."""

from engines import DATA


def task(name: str, documents: str, output_type: str, **options) -> dict:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(DATA / f"{documents}.jsonl")}},
        "test_split": "test",
        "output_type": output_type,
        "target_delimiter": "",
        **options,
    }


TASKS = [
    task(
        "choices",
        "choices",
        "multiple_choice",
        doc_to_text="{{context}}",
        doc_to_choice="{{choices}}",
        doc_to_target="label",
        metric_list=[{"metric": "acc"}],
    ),
    task(
        "perplexity",
        "passages",
        "loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    ),
    task(
        "recital",
        "passages",
        "generate_until",
        doc_to_text="{{opening}}",
        doc_to_target="{{continuation.partition('\n')[0]}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 64},
        metric_list=[{"metric": "exact_match"}],
    ),
]
