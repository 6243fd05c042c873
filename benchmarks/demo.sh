#!/bin/sh
# The whole path on this machine, in about four minutes: devices, a profile with its picture, a model fitted to it and what
# it predicts, one network measured, a search under half of the widest network's latency, its verification, a page.
set -eu
bin="${BIN:-.venv/bin}"
mkdir -p demo
table=demo/mobilenet_v1-r32.parquet
picture=demo/mobilenet_v1-r32.png
model=demo/mobilenet_v1-r32.npz
found=demo/found
rm -rf "$table" "$model" "$found"

say() { printf '\n$ latbench %s\n' "$*"; "$bin/latbench" "$@"; }

say devices
say profile --space mobilenet_v1 --resolution 32 --set num_classes=10 --set max_width=1.0 --set levels=9 --networks 20 \
    --budget 150s -o "$table"
say show "$table" --limit 8 --plot "$picture"
say fit "$table" -o "$model"
say predict "$model" widest random:1
say bench mobilenet_v1:mobilenet-v1 --resolution 96 --layers 5
half=$("$bin/latbench" predict "$model" widest --json |
    "$bin/python" -c 'import json, sys; print("%.0fus" % (500 * json.load(sys.stdin)["predictions"][0]["latency_ms"]))')
say search aows --table "$model" --target "$half" --data digits --max-images 800 --set lr=0.2 -o "$found"
say verify "$found" --until-met --rounds 3 --max-time 5s || [ $? -eq 2 ] # 2: missed, as it says
say report "$table" "$model" "$found" -o demo/report.html
printf '\ntable    %s\npicture  %s\nmodel    %s\nnetwork  %s\npage     demo/report.html\n' \
    "$table" "$picture" "$model" "$found/network.onnx"
