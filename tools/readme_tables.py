"""Writes the parameter tables of README.md and README.zh.md from the schema: `python tools/readme_tables.py`."""

from __future__ import annotations

import re
from pathlib import Path

from hynb.cli import parameter_tables
from hynb.config import GROUPS, parameters
from hynb.plan import zero

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- parameters: begin -->", "<!-- parameters: end -->"
GROUPS_ZH = {
    "model": "模型",
    "data": "数据",
    "lora": "LoRA",
    "zero": "ZeRO 与显存",
    "schedule": "训练计划",
    "run": "运行目录",
    "launch": "机器",
    "model_size": "随机模型的尺寸",
}
HELP_ZH = {
    "model_name_or_path": "基座模型目录。不给出且不续训时，用下面的尺寸随机初始化一个模型来训练。",
    "tokenizer_name_or_path": "分词器目录；auto：与模型目录相同。",
    "trust_remote_code": "运行模型目录里的 Python 文件。混元模型都不需要。",
    "use_flash_attn": "安装了 flash_attn 时使用 Flash Attention 2，否则用 PyTorch 的 sdpa。",
    "attention": "注意力算子：PyTorch 的 sdpa、Flash Attention 2 或 PyTorch 的 flex attention。"
    "auto：由 use_flash_attn 决定。缺少的由 sdpa 代替。",
    "train_data_file": 'JSONL 文件，一行一个对话：`{"messages": [{"role": …, "content": …}]}`，或由这些对话组成的 JSON 数组（.json）；也接受 ShareGPT 和 Alpaca。多个文件用逗号分隔，支持通配符、.gz 和 .zst。',
    "eval_data_file": "训练中用于评估的文件，格式相同；auto：不评估。",
    "eval_split": "从训练样本中留出用于评估的比例。",
    "eval_steps": "两次评估之间的步数；auto：与 save_steps 相同。需要 eval_data_file 或 eval_split。",
    "on_bad_sample": "如何处理无效行。stop：拒绝训练；skip：跳过，并记入 rejected.jsonl。",
    "train_on_prompt": "system 和 user 的内容也参与训练，而不只是回答。",
    "allow_special_tokens_in_text": "把消息中写出的特殊 token 文本（<|eos|>）变成该 token，与上游脚本相同；关闭：仍是普通文本。",
    "train_on_turns": "训练哪些回答：按模板渲染的样子训练全部（as_rendered，与上游一致）、完整地训练全部（all），或只训练最后一个（last）。推理模型的模板会略去先前回答的思考过程。",
    "split_turns": "每个回答连同它之前的对话各成一个样本，使每段思考都得到训练。",
    "allow_ignored_fields": "对话模板不渲染记录中的某个字段（如 tools）时仍继续；关闭：拒绝。",
    "max_cut_share": "因 max_seq_length 之内不剩任何回答而被略去的样本的最大比例；超过则不启动运行。",
    "packing": "把完整的对话打包进长度为 max_seq_length 的序列，各自只关注自己：几乎没有填充。",
    "split_long_samples": "把超过 max_seq_length 的样本切成几段全部训练，而不是截断。需要 packing；每段看不到前一段。",
    "group_by_length": "把长度相近的样本放进同一个 batch：填充更少，采样顺序的随机性略低。",
    "dataloader_num_workers": "每个 rank 预读 batch 的进程数；auto：按每个 rank 的 CPU 核数，以及样本是否仍需分词决定。",
    "max_seq_length": "超过此长度的样本会被截断。",
    "sequence_parallel_size": "共同处理每个序列的 GPU 数（Ulysses 序列并行），用于一张 GPU 放不下的长序列。必须整除 GPU 总数和模型的注意力头数。",
    "model_max_length": "分词器的最大输入长度；auto：保持分词器自己的值。",
    "use_lora": "训练 LoRA；关闭则全量微调。",
    "lora_rank": "LoRA 的秩。",
    "lora_alpha": "LoRA 的缩放：alpha / rank。",
    "lora_dropout": "LoRA 输入上的 dropout。",
    "lora_target_modules": "加 LoRA 的模块，按名字的最后一段。",
    "lora_on_experts": "所有路由专家的权重也加 LoRA（PEFT 的 target_parameters）。显存占用大得多；需要 lora_dropout 为 0。",
    "deepspeed": f"ZeRO 预设名，或一个 DeepSpeed JSON 文件。按显存占用递减：{'、'.join(zero.PRESETS)}。",
    "gradient_checkpointing": "反向传播时重新计算激活：省显存，多花约三分之一时间。",
    "make_moe_param_leaf_module": "ZeRO-3 下一次收集整个 MoE 块：通信次数少、单次大，显存占用显著增加。",
    "train_attention_params_only": "只训练 self_attn 的参数，其余冻结。",
    "bf16": "用 bfloat16 训练（A100 及更新的 GPU；CPU 也可以）。",
    "fp16": "用 float16 加损失缩放训练（较旧的 GPU）。",
    "learning_rate": "峰值学习率。",
    "min_lr": "最终学习率（绝对值）；auto：learning_rate 的十分之一。用于 cosine_with_min_lr。",
    "lr_scheduler_type": "学习率调度方式。",
    "warmup_ratio": "学习率上升阶段占总步数的比例。",
    "max_steps": "优化器步数；auto：由 num_train_epochs 决定。",
    "num_train_epochs": "max_steps 为 auto 时遍历数据的次数。",
    "per_device_train_batch_size": "micro-batch 大小：每张卡（或 sequence_parallel_size 张卡共同）一次处理的样本数。",
    "gradient_accumulation_steps": "每个优化器步累计的 micro-batch 数。全局 batch = micro-batch × 该值 × 卡数 / sequence_parallel_size。",
    "weight_decay": "AdamW 的权重衰减。",
    "max_grad_norm": "梯度裁剪到的范数。",
    "router_aux_loss_coef": "使 token 在每层各专家间均衡的损失的权重；0：不用（与上游脚本相同）。",
    "seed": "采样顺序、dropout 与新权重的随机种子。",
    "output_dir": "运行目录：日志、TensorBoard、checkpoint。",
    "overwrite_output_dir": "开始前删除 output_dir 里上一次运行的文件。",
    "resume_from_checkpoint": "续训所用的 checkpoint 目录；last 表示 output_dir 里最新的完整 checkpoint。",
    "allow_changed": "续训时允许与被中断的运行不同的参数；data 表示另外的训练数据。",
    "trust_checkpoint": "允许从没有匹配摘要的 checkpoint 续训；反序列化会运行其中的代码。",
    "on_nan": "损失或梯度为 NaN 或无穷大时的处理。stop：结束训练，并指出样本和模块；skip：所有进程跳过这一步，连续十次后停止。",
    "group_readable": "允许同组用户进入 output_dir（权限 0750）；新建的文件夹默认只有所有者可读，因为日志里会出现数据。其中文件的权限由 umask 决定：umask 为 077 时，同组用户只能看到文件名，不能读取文件内容。",
    "on_full_disk": "检查点在磁盘上放不下时的处理。stop：结束训练；keep_training：跳过并提示，下次保存时再试；最后一个检查点会等到有空间为止。",
    "on_spike": "记录的损失远高于之前的中位数时的处理。mark：记录并在图中标出；stop：结束训练。",
    "logging_steps": "events.jsonl 中两行日志之间的步数。",
    "save_strategy": "何时保存 checkpoint。",
    "save_steps": "两个 checkpoint 之间的步数。",
    "save_total_limit": "保留最新的几个 checkpoint；auto：全部。",
    "async_save": "写 checkpoint 状态时继续训练：先复制到主机内存（最多占空闲内存的一半），再在后台写入磁盘。",
    "save_safetensors": "为兼容上游脚本而接受；权重总是存为 safetensors。",
    "do_train": "为兼容上游脚本而接受；运行总是训练。",
    "num_processes": "本机的进程数；auto：每张 GPU 一个，CPU 上一个。",
    "hostfile": "列出各主机及其槽位的文件；auto：只用本机。",
    "include": "只用主机文件中的这些主机和槽位：worker-0@worker-1:0,2；auto：全部。",
    "exclude": "不用主机文件中的这些主机和槽位；auto：全部使用。写法同 include。",
    "launcher": "在其他主机上启动进程的方式；no_ssh：在每台主机上各粘贴一条命令。",
    "network_interface": "主机之间 NCCL 和 gloo 所用的网卡。auto：每台主机上通向启动主机的那一块。",
    "ssh_config": "连接各主机的 OpenSSH 配置文件；auto：主机文件所在目录中的 ssh_config，没有则用您自己的配置。",
    "start_timeout_seconds": "所有主机和 rank 互相连上的时限。到时仍未连上，运行即告结束。",
    "silence_timeout_seconds": "主机失去响应超过此时限，运行即告结束。rank 被信号暂停时也是如此。",
    "reconnect_attempts": "主机与启动主机的连接断开后，重新连接的最多次数；auto：直到 silence_timeout_seconds 用尽。0：连接一断，运行即告结束。",
    "reconnect_seconds": "两次重新连接之间的间隔。",
    "max_restarts": "运行崩溃后自动从最新 checkpoint 重新启动的最多次数；用户自己的错误不重试，同一步因同一原因再次失败也不重试。",
    "min_hosts": "其他主机不再响应时，重新启动所需的最少主机数；auto：全部主机。",
    "collective_timeout_minutes": "一个 rank 在集合通信中等待其他 rank 的时限。rank 退出或被暂停时，几秒内即被发现，与此值无关；它只用来结束互相无休止等待的 rank。",
    "save_timeout_minutes": "写检查点期间的同一时限；auto：按 100 MB/s 写完检查点所需的时间，至少为 collective_timeout_minutes。",
    "master_port": "各 rank 会合的端口；auto：任选一个空闲端口。",
    "vocab_size": "词表大小；auto：分词器的大小。",
    "hidden_size": "模型的隐藏层宽度。",
    "intermediate_size": "一个专家的中间层宽度；给出 moe_intermediate_size 时为稠密层的宽度。",
    "moe_intermediate_size": "Hy3 模型（hy_v3）一个专家的中间层宽度。auto：模型为 Hunyuan-Large，除非给出 moe_layer_num_skipped。",
    "moe_layer_num_skipped": "Hy3 模型（hy_v3）开头的稠密层数；auto：给出 moe_intermediate_size 时为 1。",
    "num_layers": "解码层数。",
    "num_attention_heads": "每层的 query 头数。",
    "num_key_value_heads": "key/value 头数；auto：与 query 头数相同。",
    "num_experts": "每层专家数；1 为稠密 MLP。",
    "moe_topk": "每个 token 路由到的专家数。",
    "use_cla": "跨层注意力（CLA）：相邻层共享 K、V。",
    "cla_share_factor": "共享一份 K、V 的层数。",
    "use_mixed_mlp_moe": "专家旁边的共享 MLP。",
    "num_shared_expert": "共享 MLP 的宽度，以专家宽度为单位。",
    "use_qk_norm": "对每个头的 query 和 key 做 RMSNorm。",
    "tie_word_embeddings": "输出层与词嵌入共用一个矩阵。",
}


def tables_zh() -> str:
    """The tables of `hynb parameters --markdown` in Chinese."""
    lines = []
    for group in GROUPS:
        lines += [f"### {GROUPS_ZH[group]}", "", "| 参数 | 默认 | 范围 | 作用 |", "|---|---|---|---|"]
        for item in parameters():
            if item.group == group:
                bounds = ", ".join(item.choices) or item.range.replace(" and ", " 且 ")
                lines.append(f"| `{item.name}` | `{item.default_text}` | {bounds} | {HELP_ZH[item.name]} |")
        lines.append("")
    return "\n".join(lines)


def with_tables(text: str, tables: str) -> str:
    """A README's text with the part between the two markers replaced."""
    pattern = re.compile(re.escape(BEGIN) + r".*?" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n\n{tables}\n{END}", text)


def main() -> None:
    """Rewrites both files."""
    for name, tables in (("README.md", parameter_tables()), ("README.zh.md", tables_zh())):
        path = ROOT / name
        path.write_text(with_tables(path.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main()
