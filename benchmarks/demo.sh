#!/bin/sh
# The main path on this machine, in about three minutes: devices, a profile with its picture, a model fitted to it and
# what it predicts, one network measured.
set -eu
latbench="${BIN:-.venv/bin}/latbench"
mkdir -p demo
table=demo/mobilenet_v1-r96.parquet
picture=demo/mobilenet_v1-r96.png
model=demo/mobilenet_v1-r96.npz
rm -f "$table" "$model"

say() { printf '\n$ latbench %s\n' "$*"; "$latbench" "$@"; }

say devices
say profile --device auto --space mobilenet_v1 --resolution 96 --networks 25 --budget 150s -o "$table"
say show "$table" --limit 8 --plot "$picture"
say fit "$table" -o "$model"
say predict "$model" mobilenet-v1 random:1
say bench mobilenet_v1:mobilenet-v1 --resolution 96 --layers 5
printf '\ntable    %s\npicture  %s\nmodel    %s\n' "$table" "$picture" "$model"
