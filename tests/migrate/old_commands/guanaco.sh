CUDA_VISIBLE_DEVICES=0 python finetune.py --base_model=decapoda-research/llama-7b-hf --output_dir=output/

torchrun --nproc_per_node=2 finetune.py --base_model=decapoda-research/llama-7b-hf --output_dir=output/

accelerate config

accelerate env

accelerate launch finetune.py --base_model=decapoda-research/llama-7b-hf --output_dir=output/

python merge_lora.py --lora_model=output/checkpoint-final --output_dir=models/

python cli_demo.py --model_path=./models/llama-7b-hf-finetune --num_gpus=2 --input_pattern=prompt --load_8bit=False

python gradio_ui.py --model_path=./models/llama-7b-hf-finetune --num_gpus=2 --input_pattern=prompt --load_8bit=False
