"""Find the columns of a table: as the user names them, else by their names and contents, which is reported."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune.data.notes import Notes
from finetune.data.reading import Columns, Reading
from finetune.data.splits_by_name import split_meaning, without_accents
from finetune.data.tables import Cell, Table
from finetune.errors import did_you_mean
from finetune.messages import natural_list

_FILE = (
    *("file_name", "filename", "file", "filepath", "file_path", "path", "image", "image_path", "imagepath", "img", "img_path"),
    *("image_file", "image_name", "imagename", "image_id", "photo", "picture", "url", "uri"),
)
_LABEL = ("label", "labels", "class", "classes", "class_name", "classname", "category", "target", "tag", "tags", "choice")
_SPLIT = ("split", "subset", "partition", "set", "usage", "phase")
_GROUP = ("group", "group_id", "groups")
_IN_OTHER_LANGUAGES = {
    _FILE: """
        bild bilder bilddatei bildname bildpfad datei dateiname dateipfad pfad foto fotos fichier nom_fichier nom_du_fichier
        chemin archivo nombre_archivo imagen ruta fichero arquivo nome_arquivo imagem caminho nome_file immagine percorso bestand
        bestandsnaam afbeelding plik nazwa_pliku obraz zdjecie sciezka soubor obrazek fil bildfil filnavn billede dosya resim
        файл имя_файла изображение картинка фото путь 画像 画像名 ファイル ファイル名 パス 图片 图像 文件 文件名 路径 圖片 檔案
        이미지 파일 파일명
    """,
    _LABEL: """
        kategorie kategorien klasse klassen klassenname etikett etiketten beschriftung bezeichnung categorie classe etiquette
        clase categoria etiqueta rotulo etichetta klasa kategoria etykieta trida klass kategori sinif etiket класс категория метка
        クラス カテゴリ カテゴリー ラベル 类别 标签 分类 類別 標籤 分類 라벨 레이블 클래스 범주
    """,
    _SPLIT: """
        aufteilung teilmenge teil menge satz datensatz repartition ensemble jeu sous_ensemble division conjunto subconjunto
        particion particao insieme suddivisione sottoinsieme podzial zbior verdeling deelverzameling выборка разбиение
        分割 区分 集合 划分 数据集 분할 구분
    """,
    _GROUP: "gruppe gruppen groupe grupo gruppo grupa группа グループ 组 그룹",
}  # without accents; used where no column has an English name
_FLAGS_OF_VAL = ("is_valid", "is_val", "is_validation")
TRUE, FALSE = frozenset({"true", "1", "yes"}), frozenset({"false", "0", "no"})
_ZERO_OR_ONE = frozenset({"0", "1", "0.0", "1.0", "true", "false"})
_IDS = ("id", "image_id", "uuid", "key", "name")  # columns that may name files without their endings
_PERHAPS_GROUPS = (
    "patient",
    "patient_id",
    "subject",
    "subject_id",
    "session",
    "session_id",
    "video",
    "video_id",
    "case_id",
    "site",
)
_PERHAPS_WEIGHTS = ("weight", "weights", "sample_weight", "sample_weights")
_SAMPLE_ROWS = 50


@dataclass(frozen=True)
class Found:
    """The columns of one table. `label` is None if the table has no labels and needs none.

    Args:
        flags_val: the cells of `split` are true for val images and false for training images.
    """

    file: str
    label: str | None
    split: str | None
    group: str | None
    weight: str | None
    flags_val: bool = False


def find_columns(
    table: Table,
    shown: str,
    reading: Reading,
    notes: Notes,
    is_file: Callable[[Cell], bool],
    is_stem: Callable[[Cell], bool],
    *,
    label_needed: bool = True,
) -> Found | None:
    """Return the columns; None if no column, or more than one, can be that of files or labels, which is noted as a problem.

    Args:
        shown: the table's name in messages.
        is_file: returns whether a cell contains an image, or names an existing one.
        is_stem: returns whether a cell names an existing image without its suffix.
    """
    chooser = _Chooser(table, shown, reading.columns, notes)
    sample = [row.cells for row in itertools.islice(table.rows(), _SAMPLE_ROWS)]
    file = chooser.named("file") or chooser.file(sample, is_file, is_stem)
    split = chooser.named("split") or chooser.split(reading, file)
    flag = None if split else chooser.flag_of_val()
    split = split or flag
    group = chooser.named("group") or chooser.alias(_GROUP, "group", reported=True)
    weight = chooser.named("weight")
    label = chooser.named("label") or chooser.label({file, split, group, weight}, sample, needed=label_needed)
    if chooser.failed or file is None or (label is None and label_needed):
        return None
    chooser.say(file, label, split, group, weight)
    return Found(file, label, split, group, weight, flags_val=flag is not None)


def _plain(column: str) -> str:
    return without_accents(column.strip().casefold()).replace(" ", "_").replace("-", "_")


class _Chooser:
    def __init__(self, table: Table, shown: str, asked: Columns, notes: Notes) -> None:
        self.table, self.shown, self.asked, self.notes = table, shown, asked, notes
        self.failed = False

    def named(self, what: str) -> str | None:
        """Return the column that the user named for `what`; None if there is none."""
        name: str | None = getattr(self.asked, what)
        if name is None or name in self.table.columns:
            return name
        same = [column for column in self.table.columns if column.casefold() == name.casefold()]
        if len(same) == 1:
            return same[0]
        self.problem(f"data.{what}_column {name!r} is no column of it.{did_you_mean(name, self.table.columns)}")
        return None

    def problem(self, message: str) -> None:
        """Note a problem, with a list of the columns."""
        self.failed = True
        self.notes.problem(self.shown, f"{message} (its columns are {natural_list(self.table.columns, 20)})")

    def aliases(self, names: tuple[str, ...]) -> list[str]:
        """Return the columns with one of these names; where there is none, those with one of them in another language.

        Case, accents, and spaces or dashes for ``_`` are ignored.
        """
        foreign = _IN_OTHER_LANGUAGES.get(names, "").split()
        found = [column for column in self.table.columns if _plain(column) in names]
        return found or [column for column in self.table.columns if _plain(column) in map(without_accents, foreign)]

    def alias(self, names: tuple[str, ...], what: str, *, reported: bool) -> str | None:
        """Return the column with one of these names if there is exactly one, else None."""
        found = self.aliases(names)
        if len(found) == 1 and reported and found[0] != what:
            self.notes.say(
                f"{self.shown}: the column {found[0]!r} was taken for the {what}; --set data.{what}_column=NAME names another"
            )
        return found[0] if len(found) == 1 else None

    def file(self, sample: Sequence[object], is_file: Callable[[Cell], bool], is_stem: Callable[[Cell], bool]) -> str | None:
        """Return the column of images."""
        if self.failed:
            return None
        by_name = self.aliases(_FILE)
        if len(by_name) == 1:
            return by_name[0]
        candidates = by_name or list(self.table.columns)
        holding = [column for column in candidates if _mostly(sample, column, is_file)]
        if len(holding) == 1:
            if not by_name:
                self.notes.say(f"{self.shown}: the column {holding[0]!r} names images; --set data.file_column=NAME names another")
            return holding[0]
        stems = [column for column in self.aliases(_IDS) if _mostly(sample, column, is_stem)] if not (holding or by_name) else []
        if len(stems) == 1:
            self.notes.say(
                f"{self.shown}: the column {stems[0]!r} names images without endings; --set data.file_column=NAME names another"
            )
            return stems[0]
        which = f"several columns may hold the image file: {natural_list(holding or by_name)}" if holding or by_name else None
        self.problem(f"{which or 'no column for the image file'}; name it with --set data.file_column=NAME")
        return None

    def label(self, taken: set[str | None], sample: Sequence[object], *, needed: bool) -> str | None:
        """Return the column of labels."""
        by_name = [column for column in self.aliases(_LABEL) if column not in taken]
        if len(by_name) == 1:
            return by_name[0]
        left = [column for column in self.table.columns if column not in taken and column]
        if not by_name and len(left) == 1:
            self.notes.say(
                f"{self.shown}: the column {left[0]!r} was taken for the label; --set data.label_column=NAME names another"
            )
            return left[0]
        if self.failed or not (needed or by_name):
            return None
        which = f"several columns may hold the label: {natural_list(by_name)}" if by_name else "no column for the label"
        flags = [column for column in left if _mostly(sample, column, lambda cell: str(cell).lower() in _ZERO_OR_ONE)]
        hint = ""
        if len(flags) > 1 and not by_name:
            hint = (
                f". {natural_list(flags)} hold 0 and 1, as if each were a label; write the names of an image's labels into one "
                "column instead, separated by | (--set 'data.label_separator=|')"
            )
        self.problem(f"{which}; name it with --set data.label_column=NAME{hint}")
        return None

    def split(self, reading: Reading, file: str | None) -> str | None:
        """Return the column of splits: named ``split``, or with another such name and only names of splits as values."""
        for column in self.aliases(_SPLIT):
            if column == file:
                continue
            values = {cell for row in self.table.rows() if isinstance(cell := row.cells.get(column), str)}
            if column.strip().casefold() == "split":
                return column
            meanings = [split_meaning(value, reading.splits) for value in values]
            are_certain = all(meaning is not None and meaning.certain for meaning in meanings)
            if values and (are_certain or len({meaning and meaning.split for meaning in meanings} - {None}) == len(values) > 1):
                self.notes.say(
                    f"{self.shown}: the column {column!r} was taken for the split; --set data.split_column=NAME names another"
                )
                return column
        return None

    def flag_of_val(self) -> str | None:
        """Return the column that is true for val images and false for others, as some libraries write it."""
        for column in self.aliases(_FLAGS_OF_VAL):
            values = {str(row.cells.get(column)).lower() for row in self.table.rows()}
            if values <= TRUE | FALSE and values & TRUE:
                self.notes.say(f"{self.shown}: the column {column!r} was taken for the split: true is val, false is train")
                return column
        return None

    def say(self, file: str, label: str | None, split: str | None, group: str | None, weight: str | None) -> None:
        """Report which columns are used, and which could be used."""
        used = {"images": file, "labels": label, "splits": split, "groups": group, "weights": weight}
        used_columns = natural_list((f"{what} from {name!r}" for what, name in used.items() if name is not None), 6)
        self.notes.say(f"{self.shown}: {used_columns}")
        if group is None and (perhaps := self.aliases(_PERHAPS_GROUPS)):
            self.notes.say(
                f"{self.shown}: if {perhaps[0]!r} says which images belong together, --set data.group_column={perhaps[0]} "
                "keeps them on one side of the split"
            )
        unused = [column for column in self.aliases(_PERHAPS_WEIGHTS) if column not in used.values()]
        if weight is None and unused:
            self.notes.say(
                f"{self.shown}: the column {unused[0]!r} is not used; with --set data.weight_column={unused[0]} each image "
                "counts that much in training"
            )


def _mostly(sample: Sequence[object], column: str, is_file: Callable[[Cell], bool]) -> bool:
    cells = [row[column] for row in sample if isinstance(row, dict) and row.get(column) is not None]
    return bool(cells) and sum(map(is_file, cells)) * 5 >= len(cells) * 4
