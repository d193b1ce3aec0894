"""The table of `dbcap export`."""

from __future__ import annotations

from pathlib import Path

from dbcap.cli import export
from dbcap.cli.output import Terminal
from dbcap.exporting.report import ExportReport, File


def test_the_table_holds_all_numbers_in_any_width(home, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    name = "onnx/decoder_model_merged_quantized.onnx"
    files = [File(name, "int8", 20_100_000, "", 0.253, 1.0, 0.958, second) for second in (0.1234, 12.3456)]
    export._show(ExportReport(Path("e"), (*files, File("[b].onnx", "fp32", 5, ""))), Terminal())
    lines = capsys.readouterr().err.replace("┃", "│").splitlines()
    head, _, *rows = [[cell.strip() for cell in line.split("│")] for line in lines]
    assert head == ["file", "size", "ratio", "quant.", "agree", "ms"]
    shares = ["25.3 %", "100.0 %", "95.8 %"]
    assert [row[2:] for row in rows] == [[*shares, "123"], [*shares, "12346"], ["", "", "", ""]]
    assert [row[0] for row in rows] == [*2 * [name.removeprefix("onnx/")], "[b].onnx"]


def test_columns_without_a_number_are_left_out(home, capsys):
    export._show(ExportReport(Path("e"), (File("a.safetensors", "", 5, ""),)), Terminal())
    assert [cell.strip() for cell in capsys.readouterr().err.splitlines()[0].split("┃")] == ["file", "size"]
