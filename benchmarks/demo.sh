#!/bin/sh
# The main path on this machine, in about two minutes: devices, a profile with its picture, one network.
set -eu
latbench="${BIN:-.venv/bin}/latbench"
mkdir -p demo
table=demo/mobilenet_v1-r96.parquet
picture=demo/mobilenet_v1-r96.png
rm -f "$table"

say() { printf '\n$ latbench %s\n' "$*"; "$latbench" "$@"; }

say devices
say profile --device auto --space mobilenet_v1 --resolution 96 --networks 20 --budget 100s -o "$table"
say show "$table" --limit 8 --plot "$picture"
say bench mobilenet_v1:mobilenet-v1 --layers 5
printf '\ntable    %s\npicture  %s\n' "$table" "$picture"
