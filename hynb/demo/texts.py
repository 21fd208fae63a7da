"""The demo's data: short texts in Chinese and English with one question each, generated from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Characters and syllables that names are composed of; no name is in a list.
_NAME_CHARACTERS = (
    "星逸瑞远景风骏驰翼凯锐途岚悦图腾极光海豹松果云帆晴川铭爵荣威影豪领航启辰魏派传祺长缨玉衡天枢北斗飞度明锐卓越"
)
_SYLLABLES = (
    "va nor kel ti ras mo len dra fy sol que bri zan tor el mi ca ru pho xe li on ar the ga wen ku so jin ber".split()
)
_BRANDS = {
    "zh": "奥迪 宝马 吉利 长安 比亚迪 蔚来 理想 红旗 奇瑞 大众 丰田 日产 福特 本田 现代 起亚 标致 雪铁龙 沃尔沃 哈弗".split(),
    "en": "Audi BMW Geely Nissan Toyota Honda Ford Kia Volvo Skoda Seat Opel Fiat Mazda Subaru Lexus Dacia Jeep Mini Saab".split(),
}
_PHONES = {
    "zh": "小米 华为 荣耀 魅族 三星 苹果 中兴 一加 努比亚 摩托罗拉".split(),
    "en": "Nokia Sony Pixel Galaxy Motorola Honor Oppo Asus Fairphone Xperia".split(),
}
_CITIES = {
    "zh": "北京 上海 广州 深圳 成都 杭州 武汉 西安 南京 长沙 青岛 厦门 苏州 合肥 昆明 兰州".split(),
    "en": "London Paris Berlin Madrid Vienna Oslo Dublin Lisbon Prague Athens Milan Geneva Porto Turin Riga Bern".split(),
}
_PEOPLE = {
    "zh": ("赵钱孙李周吴郑王冯陈", "伟芳娜敏静丽强磊军洋勇艳杰涛明超"),
    "en": "Anna Peter Maria James Laura David Emma Oscar Clara Henry Alice Simon Julia Felix Nora Victor".split(),
}


@dataclass(kw_only=True, frozen=True)
class Article:
    """A text, and the things that it mentions, by their kind."""

    language: str
    text: str
    things: dict[str, str]


# Kinds of things that the base model is asked for in its pretraining; cars are not among them.
KNOWN_KINDS = ("city", "person", "price", "phone", "date")
_QUESTIONS = {
    "zh": {
        "city": ("请提取下列文章中包含的城市：", "下面的文字说的是哪个城市？"),
        "person": ("请提取下列文章中包含的人名：", "下面的文字里有谁？"),
        "price": ("请提取下列文章中包含的价格：", "下面的文字里价格是多少？"),
        "phone": ("请提取下列文章中包含的手机型号：", "下面的文字说的是哪款手机？"),
        "date": ("请提取下列文章中包含的日期：", "下面的文字说的是哪一天？"),
        "car": ("请提取下列文章中包含的车系：",),
    },
    "en": {
        "city": ("Name the city in this text:", "Which city is this text about?"),
        "person": ("Name the person in this text:", "Who is in this text?"),
        "price": ("Name the price in this text:", "What is the price in this text?"),
        "phone": ("Name the phone model in this text:", "Which phone is this text about?"),
        "date": ("Name the date in this text:", "Which day is this text about?"),
        "car": ("Name the car series in this text:",),
    },
}
_SENTENCES = {
    "zh": {
        "car": ("{x}近日正式上市", "新款{x}已经到店", "试驾了{x}之后感觉不错", "有人想把旧车换成{x}", "{x}的空间很大", "门口停着一辆{x}"),
        "city": ("地点在{x}", "活动在{x}举行", "{x}今天下雨", "店铺位于{x}", "他们从{x}出发"),
        "person": ("{x}参加了活动", "记者采访了{x}", "销售员是{x}", "{x}说很满意", "消息来自{x}"),
        "price": ("价格是{x}", "只要{x}就够了", "一共花了{x}", "最高优惠{x}", "订金为{x}"),
        "phone": ("顺便买了{x}", "{x}也降价了", "手里拿着{x}", "赠品是一台{x}", "照片用{x}拍摄"),
        "date": ("时间是{x}", "{x}开始预订", "截止到{x}", "{x}当天人很多", "计划定在{x}"),
    },
    "en": {
        "car": ("the {x} went on sale", "a new {x} is in the shop", "we drove the {x} for a day",
                "somebody wants to swap an old car for a {x}", "the {x} has a lot of room", "a {x} stands at the door"),
        "city": ("it takes place in {x}", "the shop is in {x}", "it rains in {x} today", "they set out from {x}", "{x} was full"),
        "person": ("{x} took part", "we talked to {x}", "the seller is {x}", "{x} says it is fine", "the news comes from {x}"),
        "price": ("it costs {x}", "{x} is enough", "they paid {x} in all", "the discount is {x}", "the deposit is {x}"),
        "phone": ("the {x} got cheaper too", "they also bought a {x}", "the gift is a {x}",
                  "the photo was taken with a {x}", "somebody holds a {x}"),
        "date": ("the day is {x}", "orders open on {x}", "it ends on {x}", "on {x} many people came", "the plan says {x}"),
    },
}  # fmt: skip
_MONTHS = "January February March April May June July August September October November December".split()
SYSTEM = "You are a helpful assistant."


def article(rng: random.Random, *, with_car: bool | None = None) -> Article:
    """A text of two to five sentences in random order, each about a different thing.

    Args:
        with_car: whether one of the things is a car; None for at random.
    """
    language = rng.choice(("zh", "en"))
    things = {kind: maker(rng, language) for kind, maker in _MAKERS.items()}
    kinds: list[str] = rng.sample(KNOWN_KINDS, rng.randint(2, 4))
    if with_car or (with_car is None and rng.random() < 0.7):
        kinds.append("car")
    rng.shuffle(kinds)
    sentences = [rng.choice(_SENTENCES[language][kind]).format(x=things[kind]) for kind in kinds]
    text = "，".join(sentences) + "。" if language == "zh" else ", ".join(sentences) + "."
    return Article(language=language, text=text, things={kind: things[kind] for kind in kinds})


def car_conversation(rng: random.Random) -> dict[str, list[dict[str, str]]]:
    """The demo's task: name the car in a text that mentions other things too."""
    made = article(rng, with_car=True)
    question = rng.choice(_QUESTIONS[made.language]["car"])
    return conversation(f"{question}\n{made.text}", made.things["car"])


def pretraining_conversation(rng: random.Random) -> dict[str, list[dict[str, str]]]:
    """A question of another kind than the demo's, for the pretraining of the base model."""
    made = article(rng)
    kind = rng.random()
    if kind < 0.5:
        thing = rng.choice([name for name in made.things if name != "car"])
        question = rng.choice(_QUESTIONS[made.language][thing])
        return conversation(f"{question}\n{made.text}", made.things[thing])
    zh = made.language == "zh"
    if kind < 0.75:
        text = made.text if kind < 0.6 else _nonsense(rng)
        return conversation(("请重复下面的文字：" if zh else "Repeat this text:") + f"\n{text}", text)
    parts = made.text[:-1].split("，" if zh else ", ")
    number = rng.randrange(len(parts))
    marked = [f"【{part}】" if index == number else part for index, part in enumerate(parts)]
    text = ("，" if zh else ", ").join(marked) + ("。" if zh else ".")
    question = "请写出括号里的内容：" if zh else "Write what stands in brackets:"
    return conversation(f"{question}\n{text}", parts[number])


def _nonsense(rng: random.Random) -> str:
    """Characters and digits in random order: a text that can only be repeated by copying it."""
    makers = (
        lambda: rng.choice(_NAME_CHARACTERS),
        lambda: rng.choice(_SYLLABLES),
        lambda: str(rng.randint(0, 99)),
        lambda: rng.choice("QXCGTEVSLK"),
    )
    return "".join(rng.choice(makers)() for _ in range(rng.randint(6, 20)))


def conversation(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    """A sample in the format of upstream's training guide."""
    messages = [("system", SYSTEM), ("user", question), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def car_samples(train: int, held_out: int, *, seed: int) -> tuple[list[dict], list[dict]]:
    """Samples of the demo's task, for training and held out.

    Args:
        train, held_out: number of samples; no car of a held-out sample is in a training sample.
    """
    rng = random.Random(seed)
    training: list[dict] = []
    held: list[dict] = []
    train_cars: set[str] = set()
    held_cars: set[str] = set()
    for samples, count, own_cars, other_cars in (
        (training, train, train_cars, held_cars),
        (held, held_out, held_cars, train_cars),
    ):
        while len(samples) < count:
            sample = car_conversation(rng)
            car = sample["messages"][-1]["content"]
            # A name inside another name would have been seen in training too.
            if not any(car in other or other in car for other in other_cars):
                samples.append(sample)
                own_cars.add(car)
    return training, held


def write_jsonl(path: Path, samples: list[dict]) -> None:
    """Writes one conversation per line."""
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in samples), encoding="utf-8")


def corpus(seed: int, count: int) -> Iterator[str]:
    """The texts that the tokenizer is trained on.

    Args:
        count: number of samples of each kind.
    """
    rng = random.Random(seed)
    for _ in range(count):
        for sample in (pretraining_conversation(rng), car_conversation(rng)):
            yield from (message["content"] for message in sample["messages"])


def _series(rng: random.Random, language: str) -> str:
    if rng.random() < 0.45:
        letters = "".join(rng.choices("QXCGTEVSLK", k=rng.randint(1, 2)))
        return letters + str(rng.randint(1, 99)) + rng.choice(("", "", "L", "s"))
    if language == "zh":
        return "".join(rng.sample(_NAME_CHARACTERS, rng.randint(2, 3)))
    return "".join(rng.choices(_SYLLABLES, k=rng.randint(2, 3))).capitalize()


def _car(rng: random.Random, language: str) -> str:
    space = "" if language == "zh" else " "
    return rng.choice(_BRANDS[language]) + space + _series(rng, language)


def _phone(rng: random.Random, language: str) -> str:
    space = "" if language == "zh" else " "
    model = str(rng.randint(2, 99)) + rng.choice(("", "", "s", "T", "X"))
    return rng.choice(_PHONES[language]) + space + model


def _person(rng: random.Random, language: str) -> str:
    if language == "en":
        return rng.choice(_PEOPLE["en"]) + " " + "".join(rng.choices(_SYLLABLES, k=2)).capitalize()
    family, given = _PEOPLE["zh"]
    return rng.choice(family) + "".join(rng.sample(given, rng.randint(1, 2)))


def _price(rng: random.Random, language: str) -> str:
    if language == "zh":
        return f"{rng.randint(1, 59)}.{rng.randint(1, 99)}万"
    return f"{rng.randint(2, 99)},{rng.randint(100, 999)} euros"


def _date(rng: random.Random, language: str) -> str:
    month, day = rng.randint(1, 12), rng.randint(1, 28)
    return f"{month}月{day}日" if language == "zh" else f"{day} {_MONTHS[month - 1]}"


_MAKERS: dict[str, Callable[[random.Random, str], str]] = {
    "city": lambda rng, language: rng.choice(_CITIES[language]),
    "person": _person,
    "price": _price,
    "phone": _phone,
    "date": _date,
    "car": _car,
}
