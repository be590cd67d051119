"""LongBench (THUDM; arXiv 2308.14508): its files, prompts, answer lengths and metrics.

Prompts and lengths are the benchmark's own, to the letter; the metrics compute what its metrics.py computes.
LongBench-E has the same tasks on other samples, and its files the ending `_e`: `qasper_e`.
"""

import difflib
import itertools
import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.evaluation.host import require
from vllm_kvcompress.evaluation.quality.datafiles import DataMissing, records
from vllm_kvcompress.evaluation.quality.samples import Metric, Sample

EXTRA = "eval"
FIELDS = ("input", "context", "answers", "length", "all_classes", "_id")
CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】"
    "〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)

Score = Callable[[str, str], float]  # prediction, one right answer


def qa_f1_score(prediction: str, answer: str) -> float:
    """F1 over the words of both, lower-cased, without punctuation and articles."""
    return _f1(_english_words(prediction), _english_words(answer))


def qa_f1_zh_score(prediction: str, answer: str) -> float:
    """F1 over the words that jieba finds in both, without punctuation."""
    return _f1(_chinese_words(prediction), _chinese_words(answer))


def rouge_score(prediction: str, answer: str) -> float:
    """F1 of ROUGE-L; 0 where the `rouge` package fails: an empty text, a sentence too long for it."""
    rouge = require("rouge", EXTRA).Rouge(metrics=["rouge-l"])
    try:
        return rouge.get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
    except (ValueError, RecursionError):
        return 0.0


def rouge_zh_score(prediction: str, answer: str) -> float:
    """ROUGE-L over the words that jieba finds."""
    return rouge_score(" ".join(_cut(prediction)), " ".join(_cut(answer)))


def classification_score(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 / number of classes that the prediction names, if the right one is among them.

    Classes whose name is part of the right one's do not count. As in the original, the class after one that
    was struck out is not examined.
    """
    named = [name for name in classes if name in prediction]
    place = 0
    while place < len(named):
        if (name := named[place]) != answer and name in answer:
            named.remove(name)
        place += 1
    return 1 / len(named) if answer in named else 0.0


def retrieval_score(prediction: str, answer: str, word: str = "Paragraph ") -> float:
    """Fraction of the numbers in the prediction that are the paragraph's."""
    return count_score(prediction, re.findall(rf"{word}(\d+)", answer)[0])


retrieval_zh_score = partial(retrieval_score, word="段落")


def count_score(prediction: str, answer: str) -> float:
    """Fraction of the numbers in the prediction that are the right one."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(str(answer)) / len(numbers) if numbers else 0.0


def code_sim_score(prediction: str, answer: str) -> float:
    """Similarity, in hundredths, of the right line with the first one that is no comment and no Markdown.

    What `fuzzywuzzy.fuzz.ratio` gives without python-Levenshtein.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


def _f1(prediction: list[str], answer: list[str]) -> float:
    common = (Counter(prediction) & Counter(answer)).total()
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)


def _english_words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _chinese_words(text: str) -> list[str]:
    dropped = set(string.punctuation + CHINESE_PUNCTUATION)
    cleaned = ("".join("".join(c for c in word.lower() if c not in dropped).split()) for word in _cut(text))
    return [word for word in cleaned if word]


def _cut(text: str) -> list[str]:
    jieba = require("jieba", EXTRA)
    jieba.setLogLevel(logging.WARNING)  # it reports on its dictionary otherwise
    return jieba.lcut(text)


PACKAGES: dict[Score, tuple[str, ...]] = {
    qa_f1_zh_score: ("jieba",),
    rouge_score: ("rouge",),
    rouge_zh_score: ("jieba", "rouge"),
}


@dataclass(frozen=True)
class Task:
    """How a task asks and scores.

    Attributes:
        prompt: with `{context}` and, but for some tasks, `{input}`.
        max_tokens: length of the answer at most.
        score: prediction against one right answer.
        first_line: only the prediction's first line counts.
        stop: texts that end an answer.
    """

    prompt: str
    max_tokens: int
    score: Callable[..., float]
    first_line: bool = False
    stop: tuple[str, ...] = ()


PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other "
    "words.\n\nThe following are given passages.\n{context}\n\nAnswer the question based on the given "
    "passages. Only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:"
)

TASKS: dict[str, Task] = {
    "narrativeqa": Task(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the "
        "question asconcisely as you can, using a single phrase if possible. Do not provide any "
        "explanation.\n\nStory: {context}\n\nNow, answer the question based on the story asconcisely as "
        "you can, using a single phrase if possible. Do not provide any explanation.\n\nQuestion: "
        "{input}\n\nAnswer:",
        128,
        qa_f1_score,
    ),
    "qasper": Task(
        "You are given a scientific article and a question. Answer the question as concisely as you can, "
        "using a single phrase or sentence if possible. If the question cannot be answered based on the "
        'information in the article, write "unanswerable". If the question is a yes/no question, answer '
        '"yes", "no", or "unanswerable". Do not provide any explanation.\n\nArticle: {context}\n\n Answer '
        "the question based on the above article as concisely as you can, using a single phrase or "
        "sentence if possible. If the question cannot be answered based on the information in the article, "
        'write "unanswerable". If the question is a yes/no question, answer "yes", "no", or '
        '"unanswerable". Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:',
        128,
        qa_f1_score,
    ),
    "multifieldqa_en": Task(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question "
        "based on the above text, only give me the answer and do not output any other words.\n\nQuestion: "
        "{input}\nAnswer:",
        64,
        qa_f1_score,
    ),
    "multifieldqa_zh": Task(
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，"
        "不要输出任何其他字词。\n\n问题：{input}\n回答：",
        64,
        qa_f1_zh_score,
    ),
    "hotpotqa": Task(PASSAGES, 32, qa_f1_score),
    "2wikimqa": Task(PASSAGES, 32, qa_f1_score),
    "musique": Task(PASSAGES, 32, qa_f1_score),
    "dureader": Task(
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n"
        "问题：{input}\n回答：",
        128,
        rouge_zh_score,
    ),
    "gov_report": Task(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\n"
        "Report:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
        512,
        rouge_score,
    ),
    "qmsum": Task(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the "
        "query in one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the "
        "above meeting transcript in one or more sentences.\n\nQuery: {input}\nAnswer:",
        512,
        rouge_score,
    ),
    "multi_news": Task(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n"
        "{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:",
        512,
        rouge_score,
    ),
    "vcsum": Task(
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",
        512,
        rouge_zh_score,
    ),
    "trec": Task(
        "Please determine the type of the question below. Here are some examples of questions.\n\n"
        "{context}\n{input}",
        64,
        classification_score,
        first_line=True,
    ),
    "triviaqa": Task(
        "Answer the question based on the given passage. Only give me the answer and do not output any "
        "other words. The following are some examples.\n\n{context}\n\n{input}",
        32,
        qa_f1_score,
        first_line=True,
    ),
    "samsum": Task(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n"
        "{context}\n\n{input}",
        128,
        rouge_score,
        first_line=True,
        stop=("\n",),
    ),
    "lsht": Task(
        "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}",
        64,
        classification_score,
        first_line=True,
    ),
    "passage_count": Task(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please "
        "carefully read these paragraphs and determine how many unique paragraphs there are after removing "
        "duplicates. In other words, how many non-repeating paragraphs are there in total?\n\n{context}\n\n"
        "Please enter the final count of unique paragraphs after removing duplicates. The output format "
        "should only contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: ",
        32,
        count_score,
    ),
    "passage_retrieval_en": Task(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph "
        "the abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter "
        'the number of the paragraph that the abstract is from. The answer format must be like "Paragraph '
        '1", "Paragraph 2", etc.\n\nThe answer is: ',
        32,
        retrieval_score,
    ),
    "passage_retrieval_zh": Task(
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n"
        "下面是一个摘要\n\n{input}\n\n请输入摘要所属段落的编号。"
        '答案格式必须是"段落1"，"段落2"等格式\n\n答案是：',
        32,
        retrieval_zh_score,
    ),
    "lcc": Task(
        "Please complete the code given below. \n{context}Next line of code:\n",
        64,
        code_sim_score,
    ),
    "repobench-p": Task(
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
        64,
        code_sim_score,
    ),
}


def load(
    folder: Path,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    max_length: int | None = None,
) -> list[Sample]:
    """Samples from the data set's own `<task>.jsonl` files.

    Args:
        folder: with the files, or with the `data` folder that data.zip unpacks to.
        tasks: names, of LongBench-E with `_e`; all 21 when not given.
        limit: samples of each task at most, the first ones.
        max_length: longer samples are left out; the data set counts words, in Chinese characters.

    Raises:
        DataMissing: a task's file is not there.
        KVCompressionError: an unknown task, or a line that is not a sample.
        ModuleNotFoundError: a package that a task's metric needs is not installed.
    """
    samples: list[Sample] = []
    for name in TASKS if tasks is None else tasks:
        task = TASKS.get(name.removesuffix("_e"))
        if task is None:
            raise KVCompressionError(f"LongBench has no task {name!r}; it has {', '.join(TASKS)}")
        for package in PACKAGES.get(task.score, ()):
            require(package, EXTRA)
        before, after = task.prompt.split("{context}")
        found = (
            Sample(
                task=name,
                id=f"{name}/{record['_id']}",
                document=before + record["context"],
                question=after.replace("{input}", record["input"]),
                answers=tuple(record["answers"]),
                metric=_metric(task, record["all_classes"]),
                max_tokens=task.max_tokens,
                length=record["length"],
                stop=task.stop,
            )
            for record in records(_file(Path(folder), name), FIELDS)
            if max_length is None or record["length"] <= max_length
        )
        samples += itertools.islice(found, limit)
    return samples


def truncate_middle(tokens: Sequence[int], max_tokens: int) -> list[int]:
    """The first and the last half of what may stay, as the benchmark shortens a prompt that is too long."""
    if len(tokens) <= max_tokens:
        return list(tokens)
    half = max_tokens // 2
    return [*tokens[:half], *tokens[len(tokens) - half :]]


def _file(folder: Path, name: str) -> Path:
    paths = folder / f"{name}.jsonl", folder / "data" / f"{name}.jsonl"
    for path in paths:
        if path.is_file():
            return path
    raise DataMissing(
        f"{paths[0]} is not there: unpack data.zip of the Hugging Face data set THUDM/LongBench into {folder}"
    )


def _metric(task: Task, classes: Sequence[str] | None) -> Metric:
    score: Score = task.score
    if task.score is classification_score:
        score = partial(classification_score, classes=tuple(classes or ()))
    return partial(_best, score, task.first_line)


def _best(score: Score, first_line: bool, prediction: str, answers: tuple[str, ...]) -> float:
    if first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return max((score(prediction, answer) for answer in answers), default=0.0)
