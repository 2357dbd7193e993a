"""Interpret names as splits: ``training_set`` is certainly training data, ``train_station`` and ``entraînement`` perhaps."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from finetune.data.dataset import Split
from finetune.data.reading import SplitMeaning

_WORDS: dict[str, Split] = {
    "train": "train", "training": "train", "trn": "train", "trainval": "train",
    "val": "val", "vld": "val", "valid": "val", "validation": "val", "validate": "val",
    "dev": "val", "devel": "val", "development": "val",
    "test": "test", "testing": "test", "tst": "test", "holdout": "test", "heldout": "test",
}  # fmt: skip
_FOREIGN: dict[Split, str] = {
    "train": """
        apprentissage entrainement entrainer trainieren trainings lernen entrenamiento entrenar treino treinamento treinar
        addestramento allenamento szkolenie treniranje trenovani trening trenink egitim egitimi opleiding
        traning traening pelatihan obuchenie обучение обучающая обучающий тренировка тренировочная тренировочный навчання
        εκπαιδευση 訓練 训练 学習 トレーニング 훈련 학습 تدريب אימון
    """,
    "val": """
        validieren validierung validacion validar validacao validazione convalida validatie validering walidacja walidacyjny
        validace validointi dogrulama gecerleme validasi validatsia валидация валидационная валидационный валідація επικυρωση
        検証 验证 驗證 バリデーション 검증 تحقق אימות
    """,
    "test": """
        prufung prufungen prufen pruf pruefung pruefungen pruefen pruef
        tester testen tests essai essais prueba pruebas probar teste testes testar prova prove testowy testovaci testi testler
        testning pengujian тест тестовая тестовый тестирование δοκιμη テスト 試験 测试 測試 테스트 시험 اختبار בדיקה
    """,
}  # with or without accents; a name with one of these words perhaps means a split
_ENDINGS = """
    daten sdaten satz sdatensatz datensatz menge smenge bilder sbilder set sset
    集 組 组 用 データ データセット 画像 数据 数据集 資料 图像 세트 데이터 데이터셋
"""  # of compounds such as ``Trainingsdaten``
_FOREIGN_ENDINGS = frozenset(_ENDINGS.split())
_NEUTRAL = frozenset(
    {
        *("set", "sets", "data", "dataset", "datasets", "split", "splits", "subset", "part", "folder", "dir", "files", "class"),
        *("image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "pics", "sample", "samples", "classes"),
    }
)


@dataclass(frozen=True)
class Meaning:
    """The meaning of a name.

    Args:
        certain: whether the name contains nothing but the word for a split.
    """

    meaning: SplitMeaning
    certain: bool

    @property
    def split(self) -> Split | None:
        """The split that the name means, or None."""
        return None if self.meaning == "none" or self.meaning == "class" else self.meaning


def split_meaning(name: str, given: Mapping[str, SplitMeaning]) -> Meaning | None:
    """Return the meaning of a folder's name or of a value of a split column; None if it contains no word for a split.

    Args:
        given: meanings of names that the user has given, which come first; case is ignored.
    """
    asked = {key.casefold(): meaning for key, meaning in given.items()}
    if name.casefold() in asked:
        return Meaning(asked[name.casefold()], certain=True)
    words = [_word(token) for token in _tokens(name)]
    found = [word for word in words if word in _WORDS]
    if not found:
        meant = {split for token in _tokens(name) if (split := _foreign_word(token))}
        return Meaning(meant.pop(), certain=False) if len(meant) == 1 else None
    if len({_WORDS[word] for word in found}) != 1:
        return None
    others = [word for word in words if word not in _WORDS and word not in _NEUTRAL]
    return Meaning(_WORDS[found[0]], certain=not others)


def _tokens(name: str) -> list[str]:
    """Return the words of a name: ``trainingSet2017`` is training, set."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFC", name))
    return [token.casefold() for token in re.findall(r"[^\W\d_]+", apart)]


def _word(token: str) -> str:
    """Return the word for a split in a compound such as ``trainset``; else the token itself."""
    for word in _WORDS:
        if token.startswith(word) and token[len(word) :] in _NEUTRAL:
            return word
    return token


def without_accents(text: str) -> str:
    """Return a text without accents on Latin, Greek and Cyrillic letters; letters of other scripts stay whole."""
    apart = unicodedata.normalize("NFKD", text.replace("ı", "i").replace("æ", "ae"))
    return unicodedata.normalize("NFC", "".join(one for one in apart if not "\u0300" <= one <= "\u036f"))


_FOREIGN_WORDS: dict[str, Split] = {without_accents(word): split for split, words in _FOREIGN.items() for word in words.split()}


def _foreign_word(token: str) -> Split | None:
    """Return the split that a word of another language means, alone or in a compound such as ``Trainingsdaten``; else None."""
    plain = without_accents(token)
    if plain in _FOREIGN_WORDS:
        return _FOREIGN_WORDS[plain]
    for word, split in (_WORDS | _FOREIGN_WORDS).items():
        if plain.startswith(word) and plain[len(word) :] in _FOREIGN_ENDINGS:
            return split
    return None
