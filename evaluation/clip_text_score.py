"""CLIP text score of a folder: CLIP's logit (100 * cosine) of each picture for a prompt (the course's ViT-B/32).

python3 evaluation/clip_text_score.py --prompt "The streets of Paris." --output_dir output/1/0
"""

from __future__ import annotations

import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from p3_clip import load_clip, text_scores  # noqa: E402
from p3_concepts import image_files  # noqa: E402
from utils import Parser, cli, pick_device  # noqa: E402

load_clip = functools.lru_cache(maxsize=1)(load_clip)  # the course's graders call the function once a prompt


def calculate_clip_text_scores_folder(folder_path, text, clip="ViT-B/32", device="auto"):
    """The scores of a folder's pictures, sorted by name, as a list: the name and arguments of the course's function."""
    return text_scores(load_clip(clip, pick_device(device)), image_files(folder_path), text).tolist()


@cli
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--output_dir", required=True, help="the generated images")
    parser.add_argument("--clip", default="ViT-B/32", help="OpenAI or hub name, folder, or file in OpenAI's format")
    parser.add_argument("--device", type=pick_device, default="auto")
    args = parser.parse_args(argv)
    scores = calculate_clip_text_scores_folder(args.output_dir, args.prompt, args.clip, args.device)
    for file, score in zip(image_files(args.output_dir), scores):
        print(f"{file.name} {score:.2f}")
    print(f"CLIP Text Score: {sum(scores) / len(scores):.2f} (mean of {len(scores)} images)")


if __name__ == "__main__":
    main()
