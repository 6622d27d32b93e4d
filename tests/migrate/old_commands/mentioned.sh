torchrun --nproc_per_node=1 finetune.py
python generate.py --dev_file data_dir/Belle_open_source_0.5M.dev.json --model_name_or_path trained_models/Llama/ --lora_weights trained_models/lora-llama
python fin_lora_names.py
python test_datset.py
python test_toenizer.py
python test_model.py
python test_sft_model.py
python merge_llama_with_chinese_lora_to_hf.py --base_model BASE --lora_model LORA --output_type huggingface --output_dir OUT
python scripts/crawl_prompt.py out.txt
