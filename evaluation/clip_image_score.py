"""CLIP image score of a folder: 100 * mean cosine of each picture to the source images (the course's ViT-B/32).

python3 evaluation/clip_image_score.py --input_dir hw2_data/textual_inversion/0 --output_dir output/0/0
"""

from __future__ import annotations

import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from p3_clip import image_scores, load_clip  # noqa: E402
from p3_concepts import image_files  # noqa: E402
from utils import Parser, cli, pick_device  # noqa: E402

load_clip = functools.lru_cache(maxsize=1)(load_clip)  # the course's graders call the function once a prompt


def calculate_clip_image_scores_folder(folder_path, reference_folder, clip="ViT-B/32", device="auto"):
    """The scores of a folder's pictures, sorted by name, as a list: the name and arguments of the course's function."""
    clip = load_clip(clip, pick_device(device))
    return image_scores(clip, image_files(folder_path), image_files(reference_folder)).tolist()


@cli
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--input_dir", required=True, help="the source images")
    parser.add_argument("--output_dir", required=True, help="the generated images")
    parser.add_argument("--clip", default="ViT-B/32", help="OpenAI or hub name, folder, or file in OpenAI's format")
    parser.add_argument("--device", type=pick_device, default="auto")
    args = parser.parse_args(argv)
    files, sources = image_files(args.output_dir), image_files(args.input_dir)
    scores = calculate_clip_image_scores_folder(args.output_dir, args.input_dir, args.clip, args.device)
    for file, score in zip(files, scores):
        print(f"{file.name} {score:.2f}")
    mean = sum(scores) / len(scores)
    print(f"CLIP Image Score: {mean:.2f} (mean of {len(files)} images against {len(sources)})")


if __name__ == "__main__":
    main()
